"""Write the files from which vLLM reads a checkpoint's template and end tokens.

vLLM looks for a template in fewer places than this package, and ends a reply only at the end tokens
of `generation_config.json`: a chat model of 2023 often ends its turns with another.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.chat.find_template import NoTemplate
from gptq_loader_plugin.chat.templates import JinjaTemplate
from gptq_loader_plugin.chat.to_jinja import as_jinja
from gptq_loader_plugin.chat.tokenizer import is_mended
from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.checkpoint.model_fields import read_fields

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.chat.template import Template

__all__ = [
    "end_texts",
    "end_tokens",
    "write_generation_config",
    "write_template",
    "write_tokenizer",
]

NO_TEMPLATE = (
    "{{ raise_exception('this checkpoint has no chat template, and its vocabulary has no ChatML "
    "tokens: serve it with --template chatml or a .jinja file, or use /v1/completions') }}"
)


def write_template(template: Template, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write a template as a jinja file; where there is none, one that raises an error.

    Args:
        template: the checkpoint's, as this package finds it.
        tokenizer: the checkpoint's, which may begin every text with a token.
        folder: the folder to write into.

    Raises:
        TemplateError: it cannot be written as jinja.
    """
    if isinstance(template, NoTemplate):
        text = NO_TEMPLATE
    elif isinstance(template, JinjaTemplate):
        text = template.text
    else:
        text = _bos(tokenizer) + as_jinja(template)
    file = folder / "chat_template.jinja"
    file.write_text(text, encoding="utf-8")
    return file


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, checkpoint: Path, folder: Path
) -> Path | None:
    """Write a tokenizer of 2023 as this package reads it; vLLM reads any other by itself."""
    if not is_mended(checkpoint):
        return None
    written = folder / "tokenizer"
    tokenizer.save_pretrained(written)
    return written


def end_tokens(
    template: Template, tokenizer: PreTrainedTokenizerBase, checkpoint: Path
) -> list[int]:
    """List the tokens that end a reply: the checkpoint's, the tokenizer's and the template's."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ends.update(_token_ids(_read_object(checkpoint / name).get("eos_token_id")))
    ends.update(_token_ids(tokenizer.eos_token_id))
    vocabulary = tokenizer.get_vocab()
    return sorted(ends | {vocabulary[text] for text in template.stop if text in vocabulary})


def end_texts(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the texts that end a reply and are no single token."""
    vocabulary = tokenizer.get_vocab()
    return [text for text in template.stop if text not in vocabulary]


def write_generation_config(
    ends: list[int], checkpoint: Path, folder: Path, *, max_new_tokens: int | None
) -> Path:
    """Write the checkpoint's generation_config.json with these end tokens; return its folder.

    Args:
        ends: the tokens that end a reply.
        checkpoint: its folder.
        folder: the folder to write into.
        max_new_tokens: the limit of every reply; None leaves it to the context.
    """
    stored = {
        name: value
        for name, value in _read_object(checkpoint / "generation_config.json").items()
        if name not in ("max_new_tokens", "max_length")  # which would limit every request
    }
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    config = {**stored, "eos_token_id": ends, **limit}
    (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's first token as jinja, where it adds one to every text."""
    ids: list[int] = tokenizer("")["input_ids"]
    return "{{ bos_token }}" if ids[:1] == [tokenizer.bos_token_id] else ""


def _token_ids(value: Any) -> list[int]:  # noqa: ANN401 - a file's: a number, several, or none
    if isinstance(value, int):
        return [value]
    return value if isinstance(value, list) else []


def _read_object(file: Path) -> dict[str, Any]:
    return read_fields(read_json(file), file) if file.is_file() else {}
