"""Calibration samples: windows of a text, chats, or English prose that is on every machine."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import QuantizeError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.quantize.options import QuantizeOptions

__all__ = ["built_in_text", "calibration_samples", "chats_text"]

MARKUP = re.compile(r"\*\*|``?|^[=*~^-]{3,}$|^\s*\.\. .*$", re.MULTILINE)


def calibration_samples(
    tokenizer: PreTrainedTokenizerBase,
    options: QuantizeOptions,
    *,
    text: Path | None = None,
    context: int,
) -> list[list[int]]:
    """Cut a text into samples of equal length.

    Args:
        tokenizer: the model's.
        options: `samples`, `seq_len`, `stride` and `offset`.
        text: a text, or a .jsonl of chats; None takes prose that comes with Python.
        context: the longest sequence the model takes.

    Raises:
        QuantizeError: the text is too short for one sample, or a chat is malformed.
    """
    if text is None:
        content = built_in_text()
    elif text.suffix == ".jsonl":
        content = chats_text(text, tokenizer)
    else:
        content = text.read_text(encoding="utf-8")
    ids: list[int] = tokenizer(content, verbose=False)["input_ids"]
    length = min(options.seq_len, context)
    stride = options.stride or max(length, (len(ids) - options.offset) // options.samples)
    starts = range(options.offset, len(ids) - length + 1, stride)
    samples = [ids[start : start + length] for start in starts[: options.samples]]
    if not samples:
        raise QuantizeError(
            f"the calibration text has {len(ids):,} tokens, fewer than one sample of {length:,}",
            hint="give a longer text, or shorter samples: --seq-len",
        )
    return samples


def built_in_text() -> str:
    """Give the language reference that Python carries for `help()`: some 80,000 words of prose."""
    from pydoc_data.topics import topics

    pages: dict[str, str] = topics
    joined = "\n\n".join(pages[name] for name in sorted(pages))
    return re.sub(r"\n{3,}", "\n\n", MARKUP.sub("", joined))


def chats_text(file: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a .jsonl of chats by the tokenizer's own template.

    Each line is a list of messages, or a table with them under `messages`.

    Raises:
        QuantizeError: a line is neither, or the tokenizer has no template.
    """
    rendered = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            chat: Any = json.loads(line)
            messages = chat["messages"] if isinstance(chat, dict) else chat
            rendered.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
        except (ValueError, KeyError, TypeError) as error:
            raise QuantizeError(
                f"line {number} of {file.name} is no chat the model's template takes ({error})",
                hint='write {"messages": [{"role": "user", "content": "..."}, ...]} on each line',
            ) from error
    return "".join(rendered)
