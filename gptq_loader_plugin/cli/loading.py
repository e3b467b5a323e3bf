"""Load a model for a command: with a progress bar, and in words what was chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.cli.output import ProgressBars, say

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.load_options import LoadOptions

__all__ = ["load_with_bars"]


def load_with_bars(reference: str | Path, options: LoadOptions, *listeners: object) -> LoadedModel:
    """Load a checkpoint with a progress bar on stderr; warnings follow there.

    Args:
        reference: what to load.
        options: how.
        *listeners: plugins that hear of the load beside those installed.
    """
    import gptq_loader_plugin as gptq

    bars = ProgressBars()
    try:
        plugins = gptq.Plugins(bars, *listeners, installed=True)
        model = gptq.load(reference, options=options, plugins=plugins)
    finally:
        bars.close()
    for warning in model.warnings:
        say(f"warning: {warning}")
    return model
