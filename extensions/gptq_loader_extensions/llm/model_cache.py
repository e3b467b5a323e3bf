"""Keep one loaded model from one prompt to the next, and no second one beside it."""

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
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["Keeper", "Wanted", "the_keeper"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be loaded, and how.

    Attributes:
        reference: the checkpoint.
        backend: the kernel asked for by name, or None.
        template: the template asked for by name, or None.
        context: the longest sequence, or None.
    """

    reference: str
    backend: str | None = None
    template: str | None = None
    context: int | None = None


@dataclass(slots=True)
class _Kept:
    wanted: Wanted
    model: LoadedModel
    users: int = 0
    retired: bool = False


class Keeper:
    """Lend the loaded model out; another one takes its place once nobody uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: _Kept | None = None

    @contextmanager
    def lend(self, wanted: Wanted) -> Iterator[LoadedModel]:
        """Give the model that is wanted: the one that is kept, or load it.

        Raises:
            GPTQLoaderError: it cannot be loaded.
        """
        with self._lock:
            kept = self._kept
            if kept is None or kept.wanted != wanted:
                self._retire()
                kept = self._kept = _Kept(wanted, _load(wanted))
            kept.users += 1
        try:
            yield kept.model
        finally:
            with self._lock:
                kept.users -= 1
                if kept.retired and not kept.users:
                    kept.model.close()

    def _retire(self) -> None:
        """Close the kept model, now or when the last reply that uses it ends."""
        kept, self._kept = self._kept, None
        if kept is None:
            return
        kept.retired = True
        if not kept.users:
            kept.model.close()


@functools.cache
def the_keeper() -> Keeper:
    """Give this process's one keeper.

    llm asks for every model anew whenever one is looked up, so what is loaded must outlive the
    models that llm holds.
    """
    return Keeper()


def _load(wanted: Wanted) -> LoadedModel:
    """Load quietly, but for bars where stderr is a terminal."""
    import gptq_loader_plugin as gptq
    from gptq_loader_plugin.cli.output import ProgressBars

    bars = ProgressBars()
    plugins = gptq.Plugins(bars, installed=True)
    try:
        return gptq.load(
            _folder(wanted.reference, plugins),
            backend=wanted.backend,
            template=wanted.template,
            context=wanted.context,
            plugins=plugins,
        )
    finally:
        bars.close()


def _folder(reference: str, plugins: Plugins) -> Path:
    """Find the checkpoint on this machine, without asking the hub for news of it; else fetch it."""
    from gptq_loader_plugin.reference import resolve

    try:
        return resolve(reference, plugins=plugins, download=False)
    except CheckpointNotFound:
        return resolve(reference, plugins=plugins)
