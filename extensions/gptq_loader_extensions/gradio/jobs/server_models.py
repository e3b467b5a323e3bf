"""Put the page into the server: one model and one queue for the page and the API."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from gptq_loader_extensions.gradio.jobs.models import WAIT_SECONDS, Loaded, Ready, Stopped, planned
from gptq_loader_extensions.openai.errors import ApiError
from gptq_loader_extensions.openai.replies.engine import Ended, Failed, ReplyChunk, Run, Work
from gptq_loader_extensions.openai.replies.engine import Ready as Begun
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.planning.memory import check_memory
from gptq_loader_plugin.system.memory import resident_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gptq_loader_extensions.gradio.jobs.models import Prompt
    from gptq_loader_extensions.gradio.storage.catalog import Entry
    from gptq_loader_extensions.openai.replies.engine import Event
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.load_options import LoadOptions

__all__ = ["ServerModels"]

T = TypeVar("T")
STOPPED = "stopped"  # the engine's code for work that was cancelled before its turn


class ServerModels:
    """The server's model, as the page asks for it (`models.Models`).

    Args:
        server: holds the model and writes the replies.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._last: Loaded | None = None

    @property
    def loaded(self) -> Loaded | None:
        """The model in memory; a request may have put it there by its name."""
        found = self._server.registry.loaded
        if found is None:
            return None
        if self._last is None or self._last.model is not found[1]:
            self._last = Loaded(*found)
        return self._last

    def load(
        self,
        entry: Entry,
        options: LoadOptions,
        tell: Callable[[Progress], None],
        *,
        cancel: threading.Event | None = None,
    ) -> Loaded:
        """Load a model in place of the one before, once its replies have ended.

        Raises:
            Stopped: `cancel` was set; until the first weights are read the old one stays.
            GPTQLoaderError: it cannot be loaded; what its headers show leaves the old one there.
        """
        cancel = cancel or threading.Event()
        load = planned(entry, options, tell, cancel=cancel)

        def exchange() -> None:
            loaded = self.loaded
            check_memory(entry.name, load.plan, replaced=loaded.model.plan if loaded else None)
            before = resident_memory()
            model = self._server.registry.exchange(entry.name, load.run)
            self._last = Loaded(entry.name, model, options, before, resident_memory())

        if any(self._server.engine.counts()):
            tell(Progress("waiting", 0, 0, "replies", "replies are still being written"))
        self._alone(exchange, cancel)
        assert self._last is not None
        return self._last

    def unload(self) -> None:
        """Free the memory of the model, once its replies have ended."""
        self._last = None
        self._alone(self._server.registry.unload)

    def ask(
        self,
        prepare: Callable[[LoadedModel], Prompt],
        options: GenerateOptions,
        cancel: threading.Event,
    ) -> Iterator[Ready | Piece]:
        """Answer a prompt in its turn: `Ready` first, then the pieces.

        Raises:
            GPTQLoaderError: no model is loaded, or it does not take this prompt.
        """
        from gptq_loader_plugin.generation.generate import Piece

        if self.loaded is None:
            raise GPTQLoaderError("no model is loaded", hint="choose one in the Model tab")

        def prepared(model: LoadedModel) -> tuple[Ready, list[Run]]:
            prompt = prepare(model)
            most = self._server.most_tokens(options.max_new_tokens, model)
            run = Run(prompt.ids, options.model_copy(update={"max_new_tokens": most}), prompt.stop)
            name = (self.loaded or Loaded("", model)).name
            return Ready(name, len(prompt.ids), model.context, prompt.warning), [run]

        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        work = Work(None, prepared, events.put, cancel)
        ended = False
        try:
            for event in self._events(work, events, cancel):
                yield event.piece if isinstance(event, ReplyChunk) else event.value
            ended = True
        except Stopped:
            yield Piece("", 0, "cancelled")
        finally:
            if not ended:  # what ended by itself must not end another reply of the same `cancel`
                self._server.engine.cancel(work)

    def use(self, act: Callable[[LoadedModel], T]) -> T:
        """Do something short with the model, while no reply is written.

        Raises:
            GPTQLoaderError: no model is loaded, or the queue is full.
        """
        found: list[T] = []

        def acted() -> None:
            if (loaded := self.loaded) is not None:
                found.append(act(loaded.model))

        self._alone(acted)
        if not found:
            raise GPTQLoaderError("no model is loaded", hint="choose one in the Model tab")
        return found[0]

    def _alone(self, act: Callable[[], object], cancel: threading.Event | None = None) -> None:
        """Do something while no reply is written; it is left undone where `cancel` comes first.

        Raises:
            Stopped: `cancel` was set.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        work = Work(None, lambda _: (None, ()), events.put, alone=act)
        for _ in self._events(work, events, cancel or threading.Event()):
            pass

    def _events(
        self, work: Work, events: queue.SimpleQueue[Event], cancel: threading.Event
    ) -> Iterator[Begun | ReplyChunk]:
        """Hand work in and give its events, to its end.

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
        self, work: Work, events: queue.SimpleQueue[Event], cancel: threading.Event
    ) -> Event:
        """Wait for an event; work that is cancelled before its turn leaves the queue."""
        while True:
            with suppress(queue.Empty):
                return events.get(timeout=WAIT_SECONDS)
            if cancel.is_set():
                self._server.engine.cancel(work)
