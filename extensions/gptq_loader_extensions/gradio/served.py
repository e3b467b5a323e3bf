"""Put the page into the server: one model and one queue for the page and the API."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, TypeVar

from gptq_loader_extensions.gradio.catalog import Catalog
from gptq_loader_extensions.gradio.machine import resident_bytes
from gptq_loader_extensions.gradio.models import Loaded, LoadOptions, Ready, check_memory, planned
from gptq_loader_extensions.gradio.page import Parts
from gptq_loader_extensions.gradio.serving import mount
from gptq_loader_extensions.openai.engine import Ended, Failed, Run, Said, Work
from gptq_loader_extensions.openai.engine import Ready as Begun
from gptq_loader_extensions.openai.errors import ApiError
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from fastapi import FastAPI

    from gptq_loader_extensions.gradio.catalog import Entry
    from gptq_loader_extensions.gradio.models import Prompt
    from gptq_loader_extensions.openai.engine import Event
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generate import Piece
    from gptq_loader_plugin.loaded import LoadedModel
    from gptq_loader_plugin.options import GenerateOptions

__all__ = ["ServedModels", "mount_page"]

T = TypeVar("T")


def mount_page(app: FastAPI, server: Server) -> None:
    """Put the page at "/", behind the API's routes."""
    settings = server.settings
    catalog = Catalog(models_dir=settings.models_dir, cache=settings.cached_models)
    if (own := server.shelf.own) is not None:
        catalog.add(own.name, own.target)
    mount(app, Parts(ServedModels(server), catalog, downloads=settings.downloads))


class ServedModels:
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
        found = self._server.shelf.loaded
        if found is None:
            return None
        if self._last is None or self._last.model is not found[1]:
            self._last = Loaded(*found)
        return self._last

    def put(self, entry: Entry, options: LoadOptions, tell: Callable[[Progress], None]) -> Loaded:
        """Load a model in place of the one before, once its replies have ended.

        Raises:
            GPTQLoaderError: it cannot be loaded; what its headers show leaves the old one there.
        """
        load = planned(entry, options, tell)

        def exchange() -> None:
            check_memory(entry, load.plan, self.loaded)
            before = resident_bytes()
            model = self._server.shelf.exchange(entry.name, load.run)
            self._last = Loaded(entry.name, model, options, before, resident_bytes())

        if any(self._server.engine.counts()):
            tell(Progress("waiting", 0, 0, "replies", "replies are still being written"))
        self._alone(exchange)
        assert self._last is not None
        return self._last

    def drop(self) -> None:
        """Free the memory of the model, once its replies have ended."""
        self._last = None
        self._alone(self._server.shelf.unload)

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
        try:
            for event in self._events(work, events):
                yield event.piece if isinstance(event, Said) else event.value
        finally:
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

    def _alone(self, act: Callable[[], object]) -> None:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        work = Work(None, lambda _: (None, ()), events.put, alone=act)
        for _ in self._events(work, events):
            pass

    def _events(self, work: Work, events: queue.SimpleQueue[Event]) -> Iterator[Begun | Said]:
        """Hand work in and give its events, to its end."""
        try:
            self._server.engine.submit(work)
            while not isinstance(event := events.get(), Ended):
                if isinstance(event, Failed):
                    raise event.error
                yield event
        except ApiError as error:
            raise GPTQLoaderError(str(error), hint="try again in a moment") from error
