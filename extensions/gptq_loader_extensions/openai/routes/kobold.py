"""The routes of KoboldAI and KoboldCpp, for their clients: Kobold Lite, SillyTavern and others."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.chat_reply import FINISH
from gptq_loader_extensions.openai.replies.engine import ReplyChunk, Run
from gptq_loader_extensions.openai.replies.prompt_tokenizer import encode_end, prompt_tokenizer
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import collect
from gptq_loader_extensions.openai.replies.runs import make_runs
from gptq_loader_extensions.openai.replies.structured import constraint_masks
from gptq_loader_extensions.openai.routes.completions import cut_prompt
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.routes.sse import event, ignored_options, stream
from gptq_loader_extensions.openai.schema.openapi import ERRORS, EVENTS
from gptq_loader_extensions.openai.schema.paths import GENERATE, GENERATE_LATEST, GENERATE_STREAM
from gptq_loader_extensions.openai.schema.schemas import (
    KoboldKey,
    KoboldModel,
    KoboldPrompt,
    KoboldRequest,
)
from gptq_loader_extensions.openai.schema.unsupported import check_extra

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gptq_loader_extensions.openai.replies.reply_events import PendingReply
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["kobold_routes"]

API = "1.2.5"  # of KoboldAI's API: the last one there is
KOBOLDCPP = "1.79"  # whose routes these are; clients check that it is new enough to stream
MAX_LENGTH = 180  # KoboldCpp's, where a client names none


def kobold_routes(server: Server) -> APIRouter:  # noqa: C901 - one small function for each route
    """Return the routes."""
    router = APIRouter(responses=ERRORS, route_class=JsonRoute)
    started_at = time.monotonic()

    @router.post(GENERATE, response_model=None)
    @router.post(GENERATE_LATEST, response_model=None, include_in_schema=False)
    async def generate(body: KoboldRequest, request: Request) -> Response:
        """Complete a prompt."""
        reply = await _new_reply(server, body, request)
        started, chunks = await collect(reply, request)
        results = [
            {
                "text": "".join(chunk.piece.text for chunk in chunks if chunk.index == i),
                "finish_reason": _finish(chunks, i),
            }
            for i in range(len(started.runs))
        ]
        headers = ignored_options(request_record(request))
        return JSONResponse({"results": results}, headers=headers)

    @router.post(GENERATE_STREAM, responses=EVENTS, response_model=None)
    async def generate_stream(body: KoboldRequest, request: Request) -> Response:
        """Complete a prompt, and send the text as it comes."""
        if (body.n or 1) > 1:
            raise invalid("a stream has one reply; leave n out", param="n")
        reply = await _new_reply(server, body, request)
        first = await reply.start(request)
        assert isinstance(first, ReplyChunk), "there is at least one reply"
        return stream(_events(reply, first), reply, request_record(request), done="")

    @router.post("/api/extra/generate/check")
    @router.get("/api/extra/generate/check", include_in_schema=False)
    async def check(body: KoboldKey | None = None) -> dict[str, Any]:
        """Return the text so far of the reply that has this key."""
        texts = [reply.text for reply in _find_replies(server, body)]
        return {"results": [{"text": texts[-1] if texts else ""}]}

    @router.post("/api/extra/abort")
    async def abort(body: KoboldKey | None = None) -> dict[str, Any]:
        """End the reply that has this key; without one, the only reply of a Kobold client."""
        replies = _find_replies(server, body)
        for reply in replies:
            reply.cancel()
        success = "true" if replies else "false"
        return {"success": success, "done": success}

    @router.get("/api/v1/model")
    async def model() -> dict[str, Any]:
        """Name the model that is loaded."""
        loaded = server.registry.loaded
        return {"result": "ReadOnly" if loaded is None else loaded[0]}

    @router.put("/api/v1/model")
    async def put_model(body: KoboldModel, request: Request) -> dict[str, Any]:
        """Load a model by its name."""
        await server.with_model(request, lambda _: None, model=body.model)
        return {}

    @router.get("/api/v1/info/version")
    async def version() -> dict[str, Any]:
        """Return the version of KoboldAI's API."""
        return {"result": API}

    @router.get("/api/extra/version")
    async def extra_version() -> dict[str, Any]:
        """Return the version of KoboldCpp's API."""
        return {
            "result": "KoboldCpp",
            "version": KOBOLDCPP,
            "protected": server.settings.api_key is not None,
            "txt2img": False,
            "vision": False,
            "transcribe": False,
        }

    @router.get("/api/v1/config/max_context_length")
    @router.get("/api/extra/true_max_context_length")
    async def max_context_length(request: Request) -> dict[str, Any]:
        """Return how long a prompt and its reply may be together."""
        loaded = server.registry.loaded
        if loaded is not None:
            return {"value": loaded[1].context}
        return {"value": await server.with_model(request, lambda model: model.context)}

    @router.get("/api/v1/config/max_length")
    async def max_length() -> dict[str, Any]:
        """Return how long a reply may be where a client sets no limit."""
        return {"value": min(MAX_LENGTH, server.settings.max_new_tokens or MAX_LENGTH)}

    @router.post("/api/extra/tokencount")
    async def tokencount(body: KoboldPrompt, request: Request) -> dict[str, Any]:
        """Count a prompt's tokens."""
        ids = await server.with_tokenizer(
            request, lambda tokenizer: tokenizer(body.prompt, verbose=False)["input_ids"]
        )
        return {"value": len(ids), "ids": ids}

    @router.get("/api/extra/perf")
    async def perf() -> dict[str, Any]:
        """Return how many replies there were, and how many requests wait."""
        running, waiting = server.engine.counts()
        replies = server.metrics.total("gptq_replies_total")
        return {
            "total_gens": int(replies),
            "queue": waiting,
            "idle": int(not running),
            "uptime": round(time.monotonic() - started_at, 1),
        }

    return router


async def _new_reply(server: Server, body: KoboldRequest, request: Request) -> PendingReply:
    request_record(request).ignored = check_extra(body)
    return await server.new_reply(
        request, None, lambda model: (None, _prepare(server, body, model)), key=body.genkey or ""
    )


def _prepare(server: Server, body: KoboldRequest, model: LoadedModel) -> list[Run]:
    """Tokenise the memory and the prompt; where both are too long, cut the prompt's beginning."""
    max_tokens = server.max_tokens(body.max_tokens or MAX_LENGTH, model)
    memory = model.tokenizer(body.memory, verbose=False)["input_ids"] if body.memory else []
    ids = encode_end(model, body.prompt, model.context, add_special_tokens=not memory)
    length = min(body.truncation_length or model.context, model.context)
    ids = [*memory, *cut_prompt(ids, model, length=length - len(memory), reply=max_tokens)]
    ids = ids or model.encode("")
    masks = constraint_masks(body, prompt_tokenizer(model).grammar, begin=len(ids))
    return make_runs(body, model, ids, max_tokens=max_tokens, more=masks)


async def _events(reply: PendingReply, first: ReplyChunk) -> AsyncIterator[str]:
    async for chunk in reply.chunks(first):
        finish = None if chunk.piece.finish is None else FINISH[chunk.piece.finish]
        yield event({"token": chunk.piece.text, "finish_reason": finish}, name="message")


def _finish(chunks: list[ReplyChunk], index: int) -> str | None:
    reasons = [chunk.piece.finish for chunk in chunks if chunk.index == index]
    return next((FINISH[reason] for reason in reversed(reasons) if reason is not None), None)


def _find_replies(server: Server, body: KoboldKey | None) -> list[PendingReply]:
    """Find the replies under way that a client means by a key.

    A client without a key means its own reply, which is known only where it is the only one.
    """
    key = "" if body is None else body.genkey or ""
    replies = [
        reply for reply, reply_key in server.replies.items() if reply_key == key and not reply.ended
    ]
    return replies if key or len(replies) == 1 else []
