"""Hold one model in this process: replies run at once, and a change of the model waits for them."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from gptq_loader_extensions.gradio.jobs.models import (
    WAIT_SECONDS,
    Models,
    NoModelLoaded,
    ReplyStart,
    check_stopped,
)
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gptq_loader_extensions.gradio.jobs.models import EncodedPrompt, Loaded
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["LocalModels"]

T = TypeVar("T")


class LocalModels(Models):
    """A model in this process; replies run at once, and a change of the model waits for them."""

    def __init__(
        self, loaded: Loaded | None = None, *, environ: Mapping[str, str] = os.environ
    ) -> None:
        super().__init__(loaded, environ=environ)
        self._changed = threading.Condition()
        self._replies = 0
        self._changing = False

    def stream(
        self,
        prepare: Callable[[LoadedModel], EncodedPrompt],
        options: GenerateOptions,
        cancel: threading.Event,
    ) -> Iterator[ReplyStart | Piece]:
        """Generate the reply at once, beside those that are being written."""
        with self._reply() as loaded:
            prompt = prepare(loaded.model)
            yield ReplyStart.of(prompt, loaded.model)
            yield from loaded.model.stream_ids(
                prompt.ids,
                options,
                stop=prompt.stop,
                cancel=cancel,
                processors=prompt.processors,
                adapter=prompt.adapter,
            )

    def use(self, work: Callable[[LoadedModel], T]) -> T:
        """Run something short on the model, beside the replies that are being written."""
        with self._reply() as loaded:
            return work(loaded.model)

    @contextmanager
    def _reply(self) -> Iterator[Loaded]:
        """Keep the model loaded, inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._changing)
            loaded = self._loaded
            if loaded is None:
                raise NoModelLoaded
            self._replies += 1
        try:
            yield loaded
        finally:
            with self._changed:
                self._replies -= 1
                self._changed.notify_all()

    def _run_alone(
        self,
        work: Callable[[], T],
        on_progress: Callable[[Progress], None],
        cancel: threading.Event,
    ) -> T:
        with self._changed:
            self._wait_for(lambda: not self._changing, cancel)
            self._changing = True
        try:
            with self._changed:
                if self._replies:
                    on_progress(
                        Progress("waiting", 0, 0, "replies", "a reply is still being written")
                    )
                self._wait_for(lambda: not self._replies, cancel)
            return work()
        finally:
            with self._changed:
                self._changing = False
                self._changed.notify_all()

    def _wait_for(self, until: Callable[[], bool], cancel: threading.Event) -> None:
        while not self._changed.wait_for(until, WAIT_SECONDS):
            check_stopped(cancel)

    def _replace(self, name: str, load: Callable[[], LoadedModel]) -> LoadedModel:  # noqa: ARG002
        self._free()
        return load()

    def _free(self) -> None:
        if self._loaded is None:
            return
        from gptq_loader_plugin.system.heap import release_freed

        loaded, self._loaded = self._loaded, None
        loaded.model.close()
        del loaded
        gc.collect()
        release_freed()
