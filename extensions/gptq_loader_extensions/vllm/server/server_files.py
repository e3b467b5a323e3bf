"""Write the files that tell vLLM of a checkpoint's template and of where its replies end.

vLLM looks for a template in fewer places than this package, and ends a reply at the end token of
`generation_config.json` alone: a chat model of 2023 often ends its turns with another.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.chat.find_template import NoTemplate
from gptq_loader_plugin.chat.templates import JinjaTemplate
from gptq_loader_plugin.chat.to_jinja import as_jinja
from gptq_loader_plugin.checkpoint.config import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.chat.template import Template

__all__ = ["end_texts", "end_tokens", "write_generation_config", "write_template"]

NONE = (
    "{{ raise_exception('this checkpoint has no chat template, and its vocabulary has no ChatML "
    "tokens: serve it with --template chatml or a .jinja file, or use /v1/completions') }}"
)


def write_template(template: Template, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write a template as a file of jinja; one that refuses in words where there is none.

    Args:
        template: the checkpoint's, as this package finds it.
        tokenizer: whose first token of a text is written, where the template does not.
        folder: where the file goes.

    Raises:
        TemplateError: it cannot be written as jinja.
    """
    if isinstance(template, NoTemplate):
        text = NONE
    elif isinstance(template, JinjaTemplate):
        text = template.text
    else:
        text = _begins(tokenizer) + as_jinja(template)
    file = folder / "chat_template.jinja"
    file.write_text(text, encoding="utf-8")
    return file


def end_tokens(
    template: Template, tokenizer: PreTrainedTokenizerBase, checkpoint: Path
) -> list[int]:
    """List the tokens that end a reply: the checkpoint's, the tokenizer's and the template's."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ends.update(_numbers(_table(checkpoint / name).get("eos_token_id")))
    ends.update(_numbers(tokenizer.eos_token_id))
    known = tokenizer.get_vocab()
    return sorted(ends | {known[it] for it in template.stop if it in known})


def end_texts(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the texts that end a reply and are no single token."""
    known = tokenizer.get_vocab()
    return [it for it in template.stop if it not in known]


def write_generation_config(
    ends: list[int], checkpoint: Path, folder: Path, *, max_new_tokens: int | None
) -> Path:
    """Write the checkpoint's generation_config.json with these ends; give the folder it is in.

    Args:
        ends: the tokens that end a reply.
        checkpoint: its folder.
        folder: where the file goes.
        max_new_tokens: the most tokens of any reply; None leaves it to the context.
    """
    kept = {
        name: value
        for name, value in _table(checkpoint / "generation_config.json").items()
        if name not in ("max_new_tokens", "max_length")  # which would be a limit on every request
    }
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    told = {**kept, "eos_token_id": ends, **limit}
    (folder / "generation_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def _begins(tokenizer: PreTrainedTokenizerBase) -> str:
    """Write the first token of a text as jinja, where the tokenizer adds one by itself."""
    ids: list[int] = tokenizer("")["input_ids"]
    begins = ids[:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" if begins else ""


def _numbers(value: Any) -> list[int]:  # noqa: ANN401 - a file's: a number, several, or none
    if isinstance(value, int):
        return [value]
    return [it for it in value if isinstance(it, int)] if isinstance(value, list) else []


def _table(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
