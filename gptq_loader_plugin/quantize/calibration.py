"""Calibration samples: windows of a text, of chats, or of English prose on every machine."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

from gptq_loader_plugin.errors import QuantizeError
from gptq_loader_plugin.quantize.own_chats import render_chat, write_chats
from gptq_loader_plugin.system.paths import read_words

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.quantize.options import QuantizeOptions

__all__ = ["built_in_text", "calibration_samples", "calibration_text", "chats_text"]

MARKUP = re.compile(r"\*\*|``?|^[=*~^-]{3,}$|^\s*\.\. .*$", re.MULTILINE)


def calibration_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: QuantizeOptions,
    *,
    text: Path | Literal["own"] | None,
    progress: Callable[[Progress], None],
) -> str:
    """Find what to calibrate on: a file's text or chats, the model's own, or built-in prose.

    Args:
        model: the model before it is quantised; it writes where `text` is "own".
        tokenizer: the model's.
        options: `samples`, `seq_len` and `offset` say how much the model is to write.
        text: a text, or a .jsonl of chats; "own"; or None for prose that comes with Python.
        progress: called with how much is written.

    Raises:
        QuantizeError: a chat is malformed, or the model cannot write any.
        OptionInvalid: the file holds no text.
    """
    if text is None:
        return built_in_text()
    if text == "own":
        tokens = options.offset + options.samples * (options.stride or options.seq_len)
        chats = write_chats(model, tokenizer, tokens=tokens, progress=progress)
        return "".join(render_chat(tokenizer, chat) for chat in chats)
    if text.suffix == ".jsonl":
        return chats_text(text, tokenizer)
    return read_words(text)


def calibration_samples(
    tokenizer: PreTrainedTokenizerBase,
    options: QuantizeOptions,
    content: str,
    *,
    context: int,
) -> list[list[int]]:
    """Cut a text into samples of equal length.

    Args:
        tokenizer: the model's.
        options: `samples`, `seq_len`, `stride` and `offset`.
        content: the text.
        context: the longest sequence the model takes.

    Raises:
        QuantizeError: the text is too short for one sample.
    """
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
    """Return the language reference that Python carries for `help()`: 80,000 words of prose."""
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
    for number, line in enumerate(read_words(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            chat: Any = json.loads(line)
            messages = chat["messages"] if isinstance(chat, dict) else chat
            rendered.append(render_chat(tokenizer, messages))
        except (ValueError, KeyError, TypeError) as error:
            raise QuantizeError(
                f"line {number} of {file.name} is no chat the model's template takes ({error})",
                hint='write {"messages": [{"role": "user", "content": "..."}, ...]} on each line',
            ) from error
    return "".join(rendered)
