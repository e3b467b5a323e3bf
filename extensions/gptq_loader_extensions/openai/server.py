"""What every route needs: the settings, the models, the engine, and the counters."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from gptq_loader_extensions.openai.http.metrics import Metrics
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import PendingReply, collect
from gptq_loader_extensions.openai.replies.token_text import TokenText

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
        engine: does the work.
        metrics: counts.
        replies: those under way, with the key their client has for them: "" is a Kobold client's
            that names none, and None any other client's.
        words: writes the tokens of each model that was asked to.
        grammars: llguidance's tokenizer of each model that was asked to keep to a grammar.
    """

    settings: Settings
    registry: ModelRegistry
    engine: GenerationEngine
    metrics: Metrics = field(default_factory=Metrics)
    replies: WeakKeyDictionary[PendingReply, str | None] = field(default_factory=WeakKeyDictionary)
    words: WeakKeyDictionary[LoadedModel, TokenText] = field(default_factory=WeakKeyDictionary)
    grammars: WeakKeyDictionary[LoadedModel, Any] = field(default_factory=WeakKeyDictionary)

    async def reply(
        self,
        request: Request,
        model: str | None,
        prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]],
        *,
        key: str | None = None,
    ) -> PendingReply:
        """Make a reply to a request; it is queued when it is started.

        Args:
            request: the request.
            model: the model's name; None, or nothing, takes the one that is loaded.
            prepare: called with the model, on the engine's thread.
            key: what the client calls this reply when it wants to stop it.

        Raises:
            ApiError: there is no such model.
        """
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

    async def ask(
        self, request: Request, question: Callable[[LoadedModel], T], *, model: str | None = None
    ) -> T:
        """Have a function called with the model, in its turn.

        Raises:
            ApiError: it was refused, failed, or took too long.
        """
        reply = await self.reply(request, model, lambda loaded: (question(loaded), ()))
        ready, _ = await collect(reply, request)
        answer: T = ready.value
        return answer

    async def tokenize(self, request: Request, use: Callable[[PreTrainedTokenizerBase], T]) -> T:
        """Use the model's tokenizer without waiting for the replies under way.

        Raises:
            ApiError: there is no model, or it cannot be loaded.
        """
        if self.registry.loaded is None:
            await self.ask(request, lambda _: None)
        return await asyncio.to_thread(self.registry.with_tokenizer, use)

    def words_of(self, model: LoadedModel) -> TokenText:
        """Give what writes a model's single tokens; a vocabulary takes some time to list."""
        if model not in self.words:
            self.words[model] = TokenText(model.tokenizer)
        return self.words[model]

    def most_tokens(self, asked: int | None, model: LoadedModel) -> int:
        """Say how many tokens a reply may have: what was asked for, within the server's limit."""
        limits = (asked, self.settings.max_new_tokens, model.context)
        return min(it for it in limits if it is not None)
