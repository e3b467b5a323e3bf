"""What the core itself offers through the hooks: the GPTQ reader and ChatML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from gptq_loader_plugin.checkpoint.reader import Reader
    from gptq_loader_plugin.template import Template

__all__ = ["gptq_readers", "gptq_templates"]


@hookimpl
def gptq_readers() -> list[Reader]:
    """Offer the reader of GPTQ checkpoints."""
    from gptq_loader_plugin.checkpoint.reader import GPTQReader

    return [GPTQReader()]


@hookimpl
def gptq_templates() -> list[Template]:
    """Offer ChatML."""
    from gptq_loader_plugin.template import ChatML

    return [ChatML(source="template=chatml")]
