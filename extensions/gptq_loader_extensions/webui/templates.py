"""Tell the host which template a checkpoint wants: as jinja, which is what the host takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.chat.find_template import NoTemplate, find_template
from gptq_loader_plugin.chat.templates import ChatML
from gptq_loader_plugin.chat.to_jinja import as_jinja
from gptq_loader_plugin.checkpoint.card import read_card

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.plugins import Plugins

__all__ = ["HostTemplate", "template_for"]


@dataclass(frozen=True, slots=True)
class HostTemplate:
    """A template, as the host takes it.

    Attributes:
        jinja: its text.
        chatml: whether it is plain ChatML, which the host has under that name.
    """

    jinja: str
    chatml: bool = False


def template_for(
    folder: Path, plugins: Plugins, *, named: str | None = None
) -> HostTemplate | None:
    """Find a checkpoint's template by our own rules; None where it has none.

    Raises:
        TemplateError: `named` is no template, or one that the host cannot have.
        ConfigInvalid: `tokenizer_config.json` does not parse.
    """
    found = find_template(folder, card=read_card(folder), named=named, offered=plugins.templates())
    if isinstance(found, NoTemplate):
        return None
    return HostTemplate(as_jinja(found), chatml=isinstance(found, ChatML))
