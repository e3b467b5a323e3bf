"""What every route needs: the settings, the models, the engine, and the metrics."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from gptq_loader_extensions.openai.http.metrics import Metrics
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import PendingReply, collect
from gptq_loader_extensions.openai.replies.token_text import TokenText
from gptq_loader_extensions.openai.schema.paths import REPLY_PATHS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastapi import Request
    from transformers import PreTrainedTokenizerBase

    from gptq_loader_extensions.openai.replies.engine import GenerationEngine, Run
    from gptq_loader_extensions.openai.replies.model_registry import ModelRegistry
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
        grammar_tokenizers: llguidance's tokenizer of a model.
    """

    settings: Settings
    registry: ModelRegistry
    engine: GenerationEngine
    metrics: Metrics = field(default_factory=Metrics)
    replies: WeakKeyDictionary[PendingReply, str | None] = field(default_factory=WeakKeyDictionary)
    token_texts: WeakKeyDictionary[LoadedModel, TokenText] = field(
        default_factory=WeakKeyDictionary
    )
    grammar_tokenizers: WeakKeyDictionary[LoadedModel, Any] = field(
        default_factory=WeakKeyDictionary
    )

    async def new_reply(
        self,
        request: Request,
        model: str | None,
        prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]],
        *,
        key: str | None = None,
    ) -> PendingReply:
        """Return a reply to a request; it is queued when it is started.

        The route must be one of `REPLY_PATHS`: a proxy sends a request to these again, and to no
        other, where it has had no answer.

        Args:
            request: the request.
            model: the model's name; None, or "", takes the one that is loaded.
            prepare: called with the model, on the engine's thread.
            key: the client's own name for this reply, to stop it by.

        Raises:
            ApiError: there is no such model.
        """
        assert request.scope["route"].path in REPLY_PATHS, "add the route's path to REPLY_PATHS"
        return await self._new_reply(request, model, prepare, key=key)

    async def _new_reply(
        self,
        request: Request,
        model: str | None,
        prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]],
        *,
        key: str | None = None,
    ) -> PendingReply:
        name = await asyncio.to_thread(self.registry.resolve_name, model or None)
        reply = PendingReply(
            self.engine,
            name if model else None,
            prepare,
            timeout=self.settings.timeout,
            record=request_record(request),
        )
        self.replies[reply] = key
        return reply

    async def with_model(
        self, request: Request, function: Callable[[LoadedModel], T], *, model: str | None = None
    ) -> T:
        """Call a function with the model, in the order of the queue.

        Raises:
            ApiError: it was refused, failed, or took too long.
        """
        reply = await self._new_reply(request, model, lambda loaded: (function(loaded), ()))
        started, _ = await collect(reply, request)
        value: T = started.value
        return value

    async def with_tokenizer(
        self, request: Request, function: Callable[[PreTrainedTokenizerBase], T]
    ) -> T:
        """Call a function with the model's tokenizer, without waiting for the replies under way.

        Raises:
            ApiError: there is no model, or it cannot be loaded.
        """
        if self.registry.loaded is None:
            await self.with_model(request, lambda _: None)
        return await asyncio.to_thread(self.registry.with_tokenizer, function)

    def token_text(self, model: LoadedModel) -> TokenText:
        """Return what writes a model's single tokens; made once, as it lists the vocabulary."""
        if model not in self.token_texts:
            self.token_texts[model] = TokenText(model.tokenizer)
        return self.token_texts[model]

    def max_tokens(self, requested: int | None, model: LoadedModel) -> int:
        """Return the limit of a reply: what is requested, within the server's and the context."""
        limits = (requested, self.settings.max_new_tokens, model.context)
        return min(limit for limit in limits if limit is not None)
