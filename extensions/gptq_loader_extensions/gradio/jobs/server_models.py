"""Share the server's model: one model and one queue for the page and the API."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from gptq_loader_extensions.gradio.jobs.models import (
    WAIT_SECONDS,
    Loaded,
    Models,
    NoModelLoaded,
    ReplyStart,
    Stopped,
)
from gptq_loader_extensions.openai.errors import ApiError
from gptq_loader_extensions.openai.replies.engine import (
    Ended,
    EngineRequest,
    Failed,
    ReplyChunk,
    Run,
    Started,
)
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gptq_loader_extensions.gradio.jobs.models import EncodedPrompt
    from gptq_loader_extensions.openai.replies.engine import Event
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["ServerModels"]

T = TypeVar("T")
STOPPED = "stopped"  # the engine's code for work that was cancelled before its turn


class ServerModels(Models):
    """The server's model: the page waits in the same queue as the API's requests.

    Args:
        server: holds the model and writes the replies.
    """

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server

    @property
    def loaded(self) -> Loaded | None:
        """The model in memory; a request may have put it there by its name."""
        named = self._server.registry.loaded
        if named is None:
            return None
        if self._loaded is None or self._loaded.model is not named[1]:
            self._loaded = Loaded(*named)
        return self._loaded

    def stream(
        self,
        prepare: Callable[[LoadedModel], EncodedPrompt],
        options: GenerateOptions,
        cancel: threading.Event,
    ) -> Iterator[ReplyStart | Piece]:
        """Generate the reply in its turn among the server's requests."""
        from gptq_loader_plugin.generation.generate import Piece

        if self.loaded is None:
            raise NoModelLoaded

        def make_run(model: LoadedModel) -> tuple[ReplyStart, list[Run]]:
            prompt = prepare(model)
            limit = self._server.max_tokens(options.max_new_tokens, model)
            limited = options.model_copy(update={"max_new_tokens": limit})
            run = Run(prompt.ids, limited, prompt.stop, prompt.processors, adapter=prompt.adapter)
            return ReplyStart.of(prompt, model), [run]

        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        work = EngineRequest(None, make_run, events.put, cancel)
        ended = False
        try:
            for event in self._events(work, events, cancel):
                yield event.piece if isinstance(event, ReplyChunk) else event.value
            ended = True
        except Stopped:
            yield Piece("", 0, "cancelled")
        finally:
            if not ended:  # setting `cancel` would end another reply that shares it
                self._server.engine.cancel(work)

    def use(self, work: Callable[[LoadedModel], T]) -> T:
        """Run something short on the model, while no reply is being written."""

        def run() -> T:
            if (loaded := self.loaded) is None:
                raise NoModelLoaded
            return work(loaded.model)

        return self._alone(run, threading.Event())

    def _run_alone(
        self,
        work: Callable[[], T],
        on_progress: Callable[[Progress], None],
        cancel: threading.Event,
    ) -> T:
        if any(self._server.engine.counts()):
            on_progress(Progress("waiting", 0, 0, "replies", "replies are still being written"))
        return self._alone(work, cancel)

    def _replace(self, name: str, load: Callable[[], LoadedModel]) -> LoadedModel:
        return self._server.registry.load_with(name, load)

    def _free(self) -> None:
        self._loaded = None
        self._server.registry.unload()

    def _alone(self, work: Callable[[], T], cancel: threading.Event) -> T:
        """Submit work that runs while no reply is being written.

        Raises:
            Stopped: `cancel` was set before its turn.
        """
        results: list[T] = []
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = EngineRequest(
            None, lambda _: (None, ()), events.put, exclusive=lambda: results.append(work())
        )
        for _ in self._events(request, events, cancel):
            pass
        return results[0]

    def _events(
        self, work: EngineRequest, events: queue.SimpleQueue[Event], cancel: threading.Event
    ) -> Iterator[Started | ReplyChunk]:
        """Submit work and yield its events, to its end.

        Raises:
            Stopped: `cancel` was set before its turn.
        """
        try:
            self._server.engine.submit(work)
            while not isinstance(event := self._event(work, events, cancel), Ended):
                if isinstance(event, Failed):
                    raise event.error
                yield event
        except ApiError as error:
            if error.code == STOPPED:
                raise Stopped from error
            raise GPTQLoaderError(str(error), hint="try again in a moment") from error

    def _event(
        self, work: EngineRequest, events: queue.SimpleQueue[Event], cancel: threading.Event
    ) -> Event:
        """Wait for an event; work that is cancelled before its turn leaves the queue."""
        while True:
            with suppress(queue.Empty):
                return events.get(timeout=WAIT_SECONDS)
            if cancel.is_set():
                self._server.engine.cancel(work)
