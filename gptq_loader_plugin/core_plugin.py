"""What the core itself offers through the hooks: the demo, the GPTQ reader and ChatML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.checkpoint.reader import Reader
    from gptq_loader_plugin.events import Progress

__all__ = ["gptq_readers", "gptq_resolve", "gptq_templates"]


@hookimpl(trylast=True)
def gptq_resolve(reference: str, progress: Callable[[Progress], None]) -> Path | None:
    """Find the demo model, which is quantised the first time."""
    if reference != "demo":
        return None
    from gptq_loader_plugin.quantize.demo import prepare_demo

    return prepare_demo(progress=progress)


@hookimpl
def gptq_readers() -> list[Reader]:
    """Offer the reader of GPTQ checkpoints."""
    from gptq_loader_plugin.checkpoint.reader import GPTQReader

    return [GPTQReader()]


@hookimpl
def gptq_templates() -> list[Template]:
    """Offer ChatML."""
    from gptq_loader_plugin.chat.templates import ChatML

    return [ChatML(source="template=chatml")]
