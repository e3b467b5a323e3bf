"""Keep one model loaded from one prompt to the next, and never two."""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import CheckpointNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["ModelCache", "shared_cache"]


@dataclass(slots=True)
class _CachedModel:
    reference: str
    options: LoadOptions
    model: LoadedModel
    users: int = 0
    evicted: bool = False


class ModelCache:
    """Lend the loaded model; another one takes its place once it is not in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entry: _CachedModel | None = None

    @contextmanager
    def borrow(self, reference: str, options: LoadOptions) -> Iterator[LoadedModel]:
        """Lend a model: the loaded one, if it was loaded with these options, or load it.

        Args:
            reference: the checkpoint.
            options: how to load it.

        Raises:
            GPTQLoaderError: it cannot be loaded.
        """
        with self._lock:
            entry = self._entry
            if entry is None or (entry.reference, entry.options) != (reference, options):
                self._evict()
                entry = self._entry = _CachedModel(reference, options, _load(reference, options))
            entry.users += 1
        try:
            yield entry.model
        finally:
            with self._lock:
                entry.users -= 1
                if entry.evicted and not entry.users:
                    entry.model.close()

    def _evict(self) -> None:
        """Close the loaded model, now or when the last reply that uses it ends."""
        entry, self._entry = self._entry, None
        if entry is None:
            return
        entry.evicted = True
        if not entry.users:
            entry.model.close()


@functools.cache
def shared_cache() -> ModelCache:
    """Return the cache of this process.

    llm makes all models anew whenever it looks one up, so the loaded one must outlive them.
    """
    return ModelCache()


def _load(reference: str, options: LoadOptions) -> LoadedModel:
    """Load without output but progress bars, where stderr is a terminal."""
    import gptq_loader_plugin as gptq
    from gptq_loader_plugin.cli.output import ProgressBars

    bars = ProgressBars()
    plugins = gptq.Plugins(bars, installed=True)
    try:
        return gptq.load(_folder(reference, plugins), options=options, plugins=plugins)
    finally:
        bars.close()


def _folder(reference: str, plugins: Plugins) -> Path:
    """Find the checkpoint on this machine, or download it; the hub is not asked for updates."""
    from gptq_loader_plugin.reference import resolve

    try:
        return resolve(reference, plugins=plugins, download=False)
    except CheckpointNotFound:
        return resolve(reference, plugins=plugins)
