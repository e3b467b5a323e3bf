"""The routes that clients of text-generation-webui's API call besides OpenAI's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.prompts import next_logits
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.schema.openapi import ERRORS
from gptq_loader_extensions.openai.schema.schemas import (
    InternalLoad,
    InternalLogits,
    InternalText,
    InternalTokens,
)

if TYPE_CHECKING:
    import torch

    from gptq_loader_extensions.openai.replies.token_text import TokenText
    from gptq_loader_extensions.openai.server import Server

__all__ = ["webui_routes"]


@dataclass(frozen=True, slots=True)
class LogitsJob:
    """A prompt whose next token is to be predicted.

    Attributes:
        token_text: writes single tokens.
        ids: the prompt's tokens.
        logits: those after them [vocabulary], once they are computed.
    """

    token_text: TokenText
    ids: list[int]
    logits: list[torch.Tensor] = field(default_factory=list)

    def top(self, count: int) -> dict[str, float]:
        """Return the most probable tokens, with their probabilities."""
        (logits,) = self.logits
        best = logits.softmax(dim=-1).topk(min(count, len(logits)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return {self.token_text.name(token): probability for token, probability in pairs}


def webui_routes(server: Server) -> APIRouter:  # noqa: C901 - one small function for each route
    """Return the routes."""
    router = APIRouter(prefix="/v1/internal", responses=ERRORS, route_class=JsonRoute)

    @router.get("/model/info")
    async def info() -> dict[str, Any]:
        """Name the model that is loaded."""
        loaded = server.registry.loaded
        name = None if loaded is None else loaded[0]
        return {"model_name": name, "lora_names": [], "loader": "gptq_loader_plugin"}

    @router.get("/model/list")
    async def names() -> dict[str, Any]:
        """List the models that may be loaded."""
        models = await asyncio.to_thread(server.registry.list_models)
        return {"model_names": [model.name for model in models]}

    @router.post("/model/load")
    async def load(body: InternalLoad, request: Request) -> str:
        """Load a model by its name, with the options that the server was started with."""
        for name, value in (("args", body.args), ("settings", body.settings)):
            if value:
                raise invalid(
                    f"{name} are given when the server starts; leave them out here", param=name
                )
        await server.with_model(request, lambda _: None, model=body.model_name)
        return "OK"

    @router.post("/stop-generation")
    async def stop() -> str:
        """End every reply that is under way."""
        for reply in list(server.replies):
            reply.cancel()
        return "OK"

    @router.post("/encode")
    async def encode(body: InternalText, request: Request) -> dict[str, Any]:
        """Tokenise a text."""
        ids = await _tokenize(server, request, body.text)
        return {"tokens": ids, "length": len(ids)}

    @router.post("/decode")
    async def decode(body: InternalTokens, request: Request) -> dict[str, Any]:
        """Return the text of tokens."""
        vocabulary = await server.with_tokenizer(request, len)
        if body.tokens and max(body.tokens) >= vocabulary:
            raise invalid(f"this model's tokens are 0 to {vocabulary - 1}", param="tokens")
        text = await server.with_tokenizer(request, lambda tokenizer: tokenizer.decode(body.tokens))
        return {"text": text}

    @router.post("/token-count")
    async def count(body: InternalText, request: Request) -> dict[str, Any]:
        """Count a text's tokens."""
        ids = await _tokenize(server, request, body.text)
        return {"length": len(ids)}

    @router.post("/logits")
    async def logits(body: InternalLogits, request: Request) -> dict[str, float]:
        """Return the most probable tokens after a prompt, with their probabilities."""
        if body.use_samplers:
            raise invalid("use_samplers is not supported here; leave it out", param="use_samplers")
        job = await server.with_model(
            request,
            lambda model: LogitsJob(server.token_text(model), model.encode(body.prompt)),
            compute=lambda model, job: next_logits(model, job.ids, job.logits),
        )
        return await asyncio.to_thread(job.top, body.top_logits)

    return router


async def _tokenize(server: Server, request: Request, text: str) -> list[int]:
    ids: list[int] = await server.with_tokenizer(
        request, lambda tokenizer: tokenizer(text, verbose=False)["input_ids"]
    )
    return ids
