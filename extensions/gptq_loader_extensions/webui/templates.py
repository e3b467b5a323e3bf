"""Find a checkpoint's template and write it as jinja, as the host needs it."""

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
    """A template for the host.

    Attributes:
        jinja: its text.
        chatml: whether it is plain ChatML, which the host has by that name.
    """

    jinja: str
    chatml: bool = False


def template_for(
    folder: Path, plugins: Plugins, *, named: str | None = None
) -> HostTemplate | None:
    """Return a checkpoint's template as this package finds it; None where it has none.

    Raises:
        TemplateError: there is no template `named`, or it cannot be written as jinja.
        ConfigInvalid: `tokenizer_config.json` does not parse.
    """
    template = find_template(
        folder, card=read_card(folder), named=named, offered=plugins.templates()
    )
    if isinstance(template, NoTemplate):
        return None
    return HostTemplate(as_jinja(template), chatml=isinstance(template, ChatML))
