"""What every route needs: the settings, the models, the engine, and the metrics."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from gptq_loader_extensions.openai.errors import to_api_error
from gptq_loader_extensions.openai.http.metrics import Metrics
from gptq_loader_extensions.openai.replies.engine import Ended, EngineRequest, Failed
from gptq_loader_extensions.openai.replies.prompt_tokenizer import prompt_tokenizer
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import PendingReply, collect
from gptq_loader_extensions.openai.replies.response_store import ResponseStore
from gptq_loader_extensions.openai.replies.token_text import TokenText
from gptq_loader_extensions.openai.schema.paths import REPLY_PATHS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fastapi import Request
    from transformers import PreTrainedModel

    from gptq_loader_extensions.openai.replies.engine import Event, GenerationEngine, Run
    from gptq_loader_extensions.openai.replies.model_registry import ModelRegistry
    from gptq_loader_extensions.openai.replies.prompt_tokenizer import PromptTokenizer
    from gptq_loader_extensions.openai.settings import Settings
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["Server"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Server:
    """What the routes share.

    Attributes:
        settings: how to serve.
        registry: the models by name.
        engine: generates the replies.
        metrics: counts requests, tokens and seconds.
        replies: those under way, each with its client's key for it: "" for a Kobold client that
            sends none, and None for any other client.
        token_texts: what writes the single tokens of a model.
        responses: those that a request may go on from.
    """

    settings: Settings
    registry: ModelRegistry
    engine: GenerationEngine
    metrics: Metrics = field(default_factory=Metrics)
    replies: WeakKeyDictionary[PendingReply, str | None] = field(default_factory=WeakKeyDictionary)
    token_texts: WeakKeyDictionary[PreTrainedModel, TokenText] = field(
        default_factory=WeakKeyDictionary
    )
    responses: ResponseStore = field(default_factory=ResponseStore)

    async def new_reply(
        self,
        request: Request,
        model: str | None,
        prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]],
        *,
        key: str | None = None,
        compute: Callable[[LoadedModel, Any], Iterator[None]] | None = None,
    ) -> PendingReply:
        """Return a reply to a request; it is queued when it is started.

        The route must be one of `REPLY_PATHS`: a proxy sends a request to these again, and to no
        other, where it has had no answer.

        Args:
            request: the request.
            model: the model's name; None, or "", takes the one that is loaded.
            prepare: called with the model, on a thread that makes prompts.
            key: the client's own name for this reply, to stop it by.
            compute: as in `EngineRequest`.

        Raises:
            ApiError: there is no such model.
        """
        assert request.scope["route"].path in REPLY_PATHS, "add the route's path to REPLY_PATHS"
        reply = await self._new_reply(request, model, prepare, compute=compute)
        self.replies[reply] = key
        return reply

    async def _new_reply(
        self,
        request: Request,
        model: str | None,
        prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]],
        *,
        compute: Callable[[LoadedModel, Any], Iterator[None]] | None = None,
        at_once: bool = False,
    ) -> PendingReply:
        name = await asyncio.to_thread(self.registry.resolve_name, model or None)
        adapter = self.registry.adapter_named(model)

        def prepare_adapted(loaded: LoadedModel) -> tuple[Any, Sequence[Run]]:
            value, runs = prepare(loaded)
            return value, [replace(run, adapter=adapter) for run in runs]

        reply = PendingReply(
            self.engine,
            name if model else None,
            prepare_adapted,
            answers_as=adapter,
            timeout=self.settings.timeout,
            record=request_record(request),
            compute=compute,
            size=len(await request.body()),
            at_once=at_once,
        )
        self.replies[reply] = None
        return reply

    async def with_model(
        self,
        request: Request,
        function: Callable[[LoadedModel], T],
        *,
        model: str | None = None,
        compute: Callable[[LoadedModel, T], Iterator[None]] | None = None,
    ) -> T:
        """Return what a function makes of the model, in the order of the queue.

        Args:
            request: the request.
            function: called with the model, on a thread that makes prompts.
            model: the model's name; None takes the one that is loaded.
            compute: as in `EngineRequest`.

        Raises:
            ApiError: it was refused, failed, or took too long.
        """
        reply = await self._new_reply(
            request, model, lambda loaded: (function(loaded), ()), compute=compute
        )
        started, _ = await collect(reply, request)
        value: T = started.value
        return value

    async def with_tokenizer(self, request: Request, function: Callable[[PromptTokenizer], T]) -> T:
        """Call a function with a tokenizer of the model's, without waiting for any reply.

        Raises:
            ApiError: there is no model, or it cannot be loaded; too many requests wait.
        """
        return await self.with_prompts(request, lambda model: function(prompt_tokenizer(model)))

    async def with_prompts(
        self, request: Request, function: Callable[[LoadedModel], T], *, model: str | None = None
    ) -> T:
        """Call a function with what makes a model's prompts, without waiting for any reply.

        Args:
            request: the request.
            function: called with the model, on a thread that makes prompts.
            model: the model's name; one that is not loaded is loaded first, in its turn.

        Raises:
            ApiError: there is no model, or it cannot be loaded; too many requests wait.
        """
        loaded = self.registry.loaded
        name = await asyncio.to_thread(self.registry.resolve_name, model or None)
        if loaded is None or (model and loaded[0] != name):
            await self.with_model(request, lambda _: None, model=model)

        def prepare(loaded: LoadedModel) -> tuple[T, Sequence[Run]]:
            return function(loaded), ()

        reply = await self._new_reply(request, None, prepare, at_once=True)
        started, _ = await collect(reply, request)
        value: T = started.value
        return value

    def unload(self, name: str) -> asyncio.Future[None]:
        """Queue the unloading of a model, after the replies before it; return when that is done.

        Nothing is unloaded where another model is loaded by then. The next request loads it again.

        Raises:
            ApiError: too many requests wait already, or the server is stopping.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def unload() -> None:
            loaded = self.registry.loaded
            if loaded is not None and loaded[0] == name:
                self.registry.unload()

        def resolve(event: Event) -> None:
            if done.done():
                return
            if isinstance(event, Failed):
                done.set_exception(to_api_error(event.error))
            elif isinstance(event, Ended):
                done.set_result(None)

        def send(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(resolve, event)

        self.engine.submit(EngineRequest(None, lambda _: (None, ()), send, exclusive=unload))
        return done

    def token_text(self, model: LoadedModel) -> TokenText:
        """Return what writes a model's single tokens; made once, as it lists the vocabulary."""
        if model.model not in self.token_texts:
            self.token_texts[model.model] = TokenText(model.tokenizer)
        return self.token_texts[model.model]

    def max_tokens(self, requested: int | None, model: LoadedModel) -> int:
        """Return the limit of a reply: what is requested, within the server's and the context."""
        limits = (requested, self.settings.max_new_tokens, model.context)
        return min(limit for limit in limits if limit is not None)
