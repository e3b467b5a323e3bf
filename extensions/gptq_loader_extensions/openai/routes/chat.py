"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.routes.chat_request import (
    collect_chat,
    new_chat,
    prompt_tokens,
    start_chat,
)
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.routes.sse import event, ignored_options, stream
from gptq_loader_extensions.openai.schema.openapi import ERRORS, EVENTS
from gptq_loader_extensions.openai.schema.paths import CHAT
from gptq_loader_extensions.openai.schema.schemas import ChatRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gptq_loader_extensions.openai.replies.chat_reply import CallDelta, ChatReply, ReplyDelta
    from gptq_loader_extensions.openai.replies.engine import Started
    from gptq_loader_extensions.openai.routes.chat_request import ChatStream
    from gptq_loader_extensions.openai.schema.schemas import StreamOptions
    from gptq_loader_extensions.openai.server import Server

__all__ = ["chat_routes", "usage"]


def chat_routes(server: Server) -> APIRouter:
    """Return the route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(CHAT, responses=ERRORS | EVENTS, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        reply = await new_chat(server, request, body)
        record = request_record(request)
        base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        if not body.stream:
            started, replies = await collect_chat(reply, request)
            answer = _completion(started, replies, base)
            return JSONResponse(answer, headers=ignored_options(record))
        begun = await start_chat(reply, request)
        return stream(_events(begun, base, body.stream_options), reply, record)

    return router


def usage(started: Started, tokens: list[int], thought_tokens: int | None = None) -> dict[str, Any]:
    """Count a request's tokens; a prompt that is answered several times counts once.

    Args:
        started: the request's prompts.
        tokens: how many tokens each reply has.
        thought_tokens: how many of them are thoughts, of a model that has any.
    """
    total = prompt_tokens(started)
    counts: dict[str, Any] = {
        "prompt_tokens": total,
        "completion_tokens": sum(tokens),
        "total_tokens": total + sum(tokens),
    }
    if thought_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": thought_tokens}
    return counts


def _usage(started: Started, replies: list[ChatReply]) -> dict[str, Any]:
    thinks = started.value.prompt.marks is not None
    thought_tokens = sum(reply.thought_tokens for reply in replies) if thinks else None
    return usage(started, [reply.tokens for reply in replies], thought_tokens)


def _message(reply: ChatReply) -> dict[str, Any]:
    """Return a whole reply as a message."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.thought:
        message["reasoning_content"] = reply.thought
    if reply.calls:
        message["content"] = reply.text or None
        message["tool_calls"] = [call.to_json() for call in reply.calls]
    return message


def _choice(reply: ChatReply, index: int) -> dict[str, Any]:
    """Return a whole reply as a choice."""
    logprobs = {"content": reply.logprobs, "refusal": None} if reply.has_logprobs else None
    return {
        "index": index,
        "message": _message(reply),
        "logprobs": logprobs,
        "finish_reason": reply.finish,
    }


def _completion(started: Started, replies: list[ChatReply], base: dict[str, Any]) -> dict[str, Any]:
    return {
        **base,
        "object": "chat.completion",
        "model": started.model,
        "choices": [_choice(reply, i) for i, reply in enumerate(replies)],
        "usage": _usage(started, replies),
    }


def _delta(new: ReplyDelta) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if new.thought:
        delta["reasoning_content"] = new.thought
    if new.text:
        delta["content"] = new.text
    if new.calls:
        delta["tool_calls"] = [_call_delta(call) for call in new.calls]
    return delta


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.begun is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {
        "index": call.index,
        "id": call.begun.call_id,
        "type": "function",
        "function": {"name": call.begun.name, "arguments": call.arguments},
    }


async def _events(
    begun: ChatStream, base: dict[str, Any], options: StreamOptions | None
) -> AsyncIterator[str]:
    started, replies = begun.started, begun.replies
    base = {**base, "object": "chat.completion.chunk", "model": started.model}
    with_usage = options is not None and bool(options.include_usage)
    continuous = options is not None and bool(options.continuous_usage_stats)

    def chunk_event(index: int, delta: dict[str, Any], **fields: Any) -> str:  # noqa: ANN401
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        counts: dict[str, Any] = {"usage": None} if with_usage else {}
        if continuous:
            counts = {"usage": _usage(started, replies)}
        return event({**base, "choices": [{**choice, **fields}], **counts})

    for i in range(len(replies)):
        yield chunk_event(i, {"role": "assistant", "content": ""})
    async for index, new, chunk in begun.deltas():
        reply = replies[index]
        delta, logprobs = _delta(new), reply.add_logprobs(chunk)
        if delta or (logprobs and logprobs["content"]):
            yield chunk_event(index, delta, logprobs=logprobs)
        if reply.finish is not None:
            yield chunk_event(index, {}, finish_reason=reply.finish)
    if with_usage:
        yield event({**base, "choices": [], "usage": _usage(started, replies)})
