"""Hold one model in this process: replies run at once, and a change of the model waits for them."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from gptq_loader_extensions.gradio.jobs.models import (
    WAIT_SECONDS,
    Loaded,
    Ready,
    check_stopped,
    planned,
)
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.planning.memory import check_memory
from gptq_loader_plugin.system.memory import resident_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gptq_loader_extensions.gradio.jobs.models import Prompt
    from gptq_loader_extensions.gradio.storage.catalog import Entry
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.load_options import LoadOptions

__all__ = ["LocalModels"]

T = TypeVar("T")


class LocalModels:
    """A model in this process; replies run at once, and a change of the model waits for them.

    Args:
        loaded: the first model.
        environ: where the plugins' settings are looked up.
    """

    def __init__(
        self, loaded: Loaded | None = None, *, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._loaded = loaded
        self._environ = environ
        self._changed = threading.Condition()
        self._replies = 0
        self._changing = False

    @property
    def loaded(self) -> Loaded | None:
        """The model in memory."""
        return self._loaded

    def load(
        self,
        entry: Entry,
        options: LoadOptions,
        tell: Callable[[Progress], None],
        *,
        cancel: threading.Event | None = None,
    ) -> Loaded:
        """Load a model in place of the one before.

        Raises:
            Stopped: `cancel` was set; until the first weights are read the old one stays.
            GPTQLoaderError: it cannot be loaded; what its headers show leaves the old one there.
        """
        cancel = cancel or threading.Event()
        load = planned(entry, options, tell, cancel=cancel, environ=self._environ)
        with self._change(tell, cancel):
            loaded = self._loaded
            check_memory(entry.name, load.plan, replaced=loaded.model.plan if loaded else None)
            self._free()
            before = resident_memory()
            model = load.run()
            self._loaded = Loaded(entry.name, model, options, before, resident_memory())
            return self._loaded

    def unload(self) -> None:
        """Free the memory of the model, once its replies have ended."""
        with self._change(lambda _: None, threading.Event()):
            self._free()

    def ask(
        self,
        prepare: Callable[[LoadedModel], Prompt],
        options: GenerateOptions,
        cancel: threading.Event,
    ) -> Iterator[Ready | Piece]:
        """Answer a prompt: `Ready` first, then the pieces.

        Raises:
            GPTQLoaderError: no model is loaded, or it does not take this prompt.
        """
        with self._reply() as loaded:
            prompt = prepare(loaded.model)
            yield Ready(loaded.name, len(prompt.ids), loaded.model.context, prompt.warning)
            yield from loaded.model.stream_ids(prompt.ids, options, stop=prompt.stop, cancel=cancel)

    def use(self, act: Callable[[LoadedModel], T]) -> T:
        """Do something short with the model, which stays loaded meanwhile.

        Raises:
            GPTQLoaderError: no model is loaded.
        """
        with self._reply() as loaded:
            return act(loaded.model)

    @contextmanager
    def _reply(self) -> Iterator[Loaded]:
        """Keep the model loaded, inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._changing)
            loaded = self._loaded
            if loaded is None:
                raise GPTQLoaderError("no model is loaded", hint="choose one in the Model tab")
            self._replies += 1
        try:
            yield loaded
        finally:
            with self._changed:
                self._replies -= 1
                self._changed.notify_all()

    @contextmanager
    def _change(self, tell: Callable[[Progress], None], cancel: threading.Event) -> Iterator[None]:
        """Have the model to oneself: no reply runs, and new ones wait."""
        with self._changed:
            self._wait_for(lambda: not self._changing, cancel)
            self._changing = True
        try:
            with self._changed:
                if self._replies:
                    tell(Progress("waiting", 0, 0, "replies", "a reply is still being written"))
                self._wait_for(lambda: not self._replies, cancel)
            yield
        finally:
            with self._changed:
                self._changing = False
                self._changed.notify_all()

    def _wait_for(self, until: Callable[[], bool], cancel: threading.Event) -> None:
        while not self._changed.wait_for(until, WAIT_SECONDS):
            check_stopped(cancel)

    def _free(self) -> None:
        if self._loaded is None:
            return
        from gptq_loader_plugin.system.heap import release_freed

        loaded, self._loaded = self._loaded, None
        loaded.model.close()
        del loaded
        gc.collect()
        release_freed()
