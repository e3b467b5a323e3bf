"""Find the template of a checkpoint, and say where it came from.

The order: what the user names; the checkpoint's own (`chat_template.jinja`,
`tokenizer_config.json`); the `prompt_template` of its model card; ChatML, where both of its
tokens are single tokens of the vocabulary; else none, and only completion works.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.chat.templates import (
    CHATML_END,
    CHATML_START,
    CardTemplate,
    ChatML,
    JinjaTemplate,
)
from gptq_loader_plugin.chat.tokenizer import RANKS, emptied_tokens
from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.errors import TemplateError
from gptq_loader_plugin.system.paths import local_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.checkpoint.card import Card

__all__ = ["NoTemplate", "find_template", "known_tokens"]

TEMPLATE_BYTES = 1 << 20
VOCABULARY_BYTES = 1 << 26  # the largest there are take half of it
JINJA_MARKS = ("{%", "{{")


@dataclass(frozen=True, slots=True)
class NoTemplate:
    """No template was found: messages cannot be rendered, prompts can still be completed."""

    name: str = "none"
    source: str = "no chat template in the checkpoint or its card, and no ChatML tokens"
    stop: tuple[str, ...] = ()

    def render(self, messages: Sequence[Any], *, add_generation_prompt: bool = True) -> str:
        """Refuse, with what to do instead.

        Raises:
            TemplateError: always.
        """
        del messages, add_generation_prompt
        raise TemplateError(
            "this checkpoint has no chat template, and its vocabulary has no ChatML tokens",
            hint='name one: template="chatml" or a .jinja file; or complete a prompt with '
            "generate, which needs no template",
        )

    def encode(
        self, messages: Sequence[Any], tokenizer: object, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Refuse, as `render` does."""
        del tokenizer
        self.render(messages, add_generation_prompt=add_generation_prompt)
        return []


def find_template(
    folder: Path,
    *,
    card: Card,
    named: str | Template | None = None,
    offered: Sequence[Template] = (),
    rows: int | None = None,
) -> Template:
    """Find the template to use; reads files only, so no tokenizer is needed.

    Args:
        folder: the checkpoint's folder.
        card: what its model card says.
        named: a template, a template's name, the path of a .jinja file, or jinja text.
        offered: the plugins' templates, found by name.
        rows: the tokens that the model knows; None takes what config.json says.

    Raises:
        TemplateError: `named` is none of these.
        ConfigInvalid: `tokenizer_config.json` does not parse.
    """
    if named is not None and not isinstance(named, str):
        return named
    tokens = _tokens(folder)
    if named is not None:
        return _named(named, folder, card=card, offered=offered, tokens=tokens)
    return _own(folder, tokens) or _cards(card) or _chatml(folder, rows) or NoTemplate()


def known_tokens(folder: Path) -> dict[str, int | None]:
    """List the single tokens that a checkpoint's tokenizer files add to its vocabulary.

    Returns:
        The id of each, or None where the file that names it does not say.
    """
    known: dict[str, int | None] = {}
    for value in _table(folder / "special_tokens_map.json").values():
        if isinstance(value, str):
            known[value] = None
    for name in ("added_tokens.json", "vocab.json"):
        known.update({token: _index(index) for token, index in _table(folder / name).items()})
    config = _table(folder / "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder")
    for index, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict):
            known[str(entry.get("content"))] = int(index) if str(index).isdigit() else None
    known.update(_tokenizer_tokens(_table(folder / "tokenizer.json")))
    if (folder / RANKS).is_file():  # Qwen's own code adds them
        known.update({CHATML_START: None, CHATML_END: None})
    return known


def _tokenizer_tokens(tokenizer: dict[str, Any]) -> dict[str, int | None]:
    """List the tokens that a tokenizer.json adds, and ChatML's where they are in its vocabulary."""
    added = [token for token in tokenizer.get("added_tokens") or [] if isinstance(token, dict)]
    known = {str(token.get("content")): _index(token.get("id")) for token in added}
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if not isinstance(vocabulary, dict):
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    chatml = (CHATML_START, CHATML_END)
    return known | {token: _index(vocabulary[token]) for token in chatml if token in vocabulary}


def _index(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _named(
    named: str,
    folder: Path,
    *,
    card: Card,
    offered: Sequence[Template],
    tokens: dict[str, str],
) -> Template:
    for template in offered:
        if template.name == named:
            return template
    if named == "chatml":
        return ChatML(source="template=chatml")
    if named in ("checkpoint", "card"):
        own = _own(folder, tokens) if named == "checkpoint" else _cards(card)
        if own is not None:
            return own
        raise TemplateError(
            f"the {'checkpoint' if named == 'checkpoint' else 'model card'} brings no template",
            hint='leave template out, or name another: template="chatml"',
        )
    if any(mark in named for mark in JINJA_MARKS):
        return JinjaTemplate(named, name="given", source="the text given", tokens=tokens).probed()
    file = local_path(named)
    if file.is_file():
        text = _text(file)
        return JinjaTemplate(text, name=file.stem, source=file.name, tokens=tokens).probed()
    names = ", ".join(
        dict.fromkeys(["chatml", "checkpoint", "card", *(template.name for template in offered)])
    )
    raise TemplateError(
        f"no template is called {named!r}", hint=f"name one of {names}, or a .jinja file"
    )


def _own(folder: Path, tokens: dict[str, str]) -> Template | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        text = _text(file)
        return JinjaTemplate(text, source=file.name, tokens=tokens).probed()
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = _table(folder / name).get("chat_template")
        source = name
        if isinstance(value, list):  # several, by name
            value, called = _first_template(value)
            source = f"{name}, the one called {called!r}" if called != "default" else name
        if isinstance(value, str) and value:
            return JinjaTemplate(value, source=source, tokens=tokens).probed()
    return None


def _first_template(entries: list[Any]) -> tuple[str | None, str]:
    """Return the default one of several templates, or the first that is for plain chats; its name.

    Some are for tools or documents alone ("tool_use", "rag"), and come last.
    """
    named = [
        (entry.get("template"), str(entry.get("name")))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("template"), str)
    ]
    named.sort(key=lambda it: (it[1] != "default", it[1] in ("tool_use", "rag")))
    return named[0] if named else (None, "default")


def _cards(card: Card) -> Template | None:
    if card.prompt_template is None:
        return None
    template = CardTemplate(card.prompt_template)
    if CHATML_START in card.prompt_template:
        return ChatML(source=f"prompt_template of {template.source}, which is ChatML")
    return template


def _chatml(folder: Path, rows: int | None) -> Template | None:
    """Return ChatML where both of its tokens are the model's: some tokenizers have more."""
    known = known_tokens(folder)
    if rows is None:
        stored = _table(folder / "config.json")
        text = stored.get("text_config")
        stated = (text if isinstance(text, dict) else stored).get("vocab_size")
        rows = _index(stated)
    if all(
        token in known and (rows is None or (known[token] or 0) < rows)
        for token in (CHATML_START, CHATML_END)
    ):
        return replace(ChatML(), source="both ChatML tokens are in the vocabulary")
    return None


def _tokens(folder: Path) -> dict[str, str]:
    """Read the special tokens that a jinja template may name."""
    tokens = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _table(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens | {key: it for key, it in emptied_tokens(folder).items() if isinstance(it, str)}


def _text(file: Path) -> str:
    """Read a template's file.

    Raises:
        TemplateError: it is no text, or far too much of it.
    """
    if (size := file.stat().st_size) > TEMPLATE_BYTES:
        raise TemplateError(
            f"{file} is {size:,} bytes, and no template has more than {TEMPLATE_BYTES:,}",
            hint='download it again, or name another template: template="chatml"',
        )
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TemplateError(
            f"{file} is not UTF-8 text, so it is no template",
            hint='download it again, or name another template: template="chatml"',
        ) from error


def _table(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    if file.name in ("tokenizer.json", "vocab.json"):  # large, and not ours to judge
        if file.stat().st_size > VOCABULARY_BYTES:
            return {}
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError):  # its own reader will say what is wrong with it
            return {}
        return content if isinstance(content, dict) else {}
    return read_json(file)
