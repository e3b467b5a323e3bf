"""Check a page's checkpoint: verify it, or find which other programs take it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio.jobs.models import ProgressListener
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.planning.memory import check_memory

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from gptq_loader_extensions.gradio.storage.catalog import CatalogEntry
    from gptq_loader_plugin.catalog.engines.engine import Answer
    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.verify.report import Report

__all__ = ["check", "find_engines"]


def check(
    entry: CatalogEntry, cancel: threading.Event, on_progress: Callable[[Progress], None]
) -> Report:
    """Verify a checkpoint beside the model that is loaded, which goes on answering.

    Args:
        entry: what a person chose.
        cancel: ends it once it is set.
        on_progress: called with the progress.

    Raises:
        Stopped: `cancel` was set.
        NotEnoughMemory: it does not fit beside what is loaded.
        GPTQLoaderError: it cannot be looked at.
    """
    from gptq_loader_plugin.errors import CheckpointError
    from gptq_loader_plugin.verify.run import verify

    plugins = gptq.Plugins(ProgressListener(on_progress, cancel), installed=True)
    with suppress(CheckpointError):  # the report says what is wrong with it
        check_memory(entry.name, gptq.explain(entry.target, plugins=plugins))
    return verify(str(entry.target), options=LoadOptions(), plugins=plugins, split=False)


def find_engines(entry: CatalogEntry) -> tuple[Answer, ...]:
    """Ask every engine whether it takes a checkpoint.

    Raises:
        GPTQLoaderError: it cannot be opened.
    """
    from gptq_loader_plugin.catalog.where import find_where

    return find_where(str(entry.target), plugins=gptq.Plugins(installed=True))
