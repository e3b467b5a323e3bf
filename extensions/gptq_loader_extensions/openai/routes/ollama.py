"""The routes of Ollama that write replies, for its clients."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_loader_extensions.openai.replies.chat_reply import FINISH
from gptq_loader_extensions.openai.replies.engine import ReplyChunk
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import collect
from gptq_loader_extensions.openai.routes.chat_request import (
    collect_chat,
    new_chat,
    prompt_tokens,
    start_chat,
)
from gptq_loader_extensions.openai.routes.completions import new_completion
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.routes.ollama_models import (
    LINES,
    and_then,
    load_or_unload,
    now,
    unload_afterwards,
)
from gptq_loader_extensions.openai.routes.sse import ignored_options, stream
from gptq_loader_extensions.openai.schema.json_text import parse_json
from gptq_loader_extensions.openai.schema.ollama import (
    OllamaChat,
    OllamaGenerate,
    read_chat,
    read_generate,
)
from gptq_loader_extensions.openai.schema.openapi import OLLAMA_ERRORS
from gptq_loader_extensions.openai.schema.paths import OLLAMA_CHAT, OLLAMA_GENERATE
from gptq_loader_extensions.openai.schema.schemas import ChatRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gptq_loader_extensions.openai.errors import ApiError
    from gptq_loader_extensions.openai.replies.chat_reply import ChatReply
    from gptq_loader_extensions.openai.replies.record import RequestRecord
    from gptq_loader_extensions.openai.replies.reply_events import PendingReply
    from gptq_loader_extensions.openai.routes.chat_request import ChatStream
    from gptq_loader_extensions.openai.server import Server

__all__ = ["ollama_routes"]

BILLION = 10**9
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "the whole reply, or lines", "content": {LINES: {}}}
}


def ollama_routes(server: Server) -> APIRouter:
    """Return the routes."""
    router = APIRouter(responses=OLLAMA_ERRORS, route_class=JsonRoute)

    @router.post(OLLAMA_CHAT, responses=STREAM, response_model=None)
    async def chat(body: OllamaChat, request: Request) -> Response:
        """Answer a conversation; without messages, load the model, or unload it."""
        if not body.messages:
            return await load_or_unload(server, request, body, {"message": _empty_message()})
        read, ignored = read_chat(body)
        reply = await new_chat(server, request, read, ignored=ignored)
        then = await unload_afterwards(server, body)
        stream_it = body.stream is not False
        return await _chat_response(reply, request, stream_it=stream_it, then=then)

    @router.post(OLLAMA_GENERATE, responses=STREAM, response_model=None)
    async def generate(body: OllamaGenerate, request: Request) -> Response:
        """Answer a prompt; without one, load the model, or unload it."""
        if not body.prompt:
            return await load_or_unload(server, request, body, {"response": ""})
        read, ignored = read_generate(body)
        then = await unload_afterwards(server, body)
        stream_it = body.stream is not False
        if isinstance(read, ChatRequest):
            reply = await new_chat(server, request, read, ignored=ignored)
            return await _chat_response(
                reply, request, stream_it=stream_it, then=then, as_text=True
            )
        reply = await new_completion(server, request, read)
        record = request_record(request)
        record.ignored = (*record.ignored, *ignored)
        return await _raw_response(reply, request, stream_it=stream_it, then=then)

    return router


def _empty_message() -> dict[str, Any]:
    return {"role": "assistant", "content": ""}


def _counts(record: RequestRecord, prompt: int, tokens: int) -> dict[str, int]:
    """Return how long a reply took, in nanoseconds, and how many tokens it has."""
    now = time.monotonic()
    started = record.started_at or now
    first = record.first_chunk_at or now
    return {
        "total_duration": int((now - record.began) * BILLION),
        "load_duration": int((started - record.began) * BILLION),
        "prompt_eval_count": prompt,
        "prompt_eval_duration": int((first - started) * BILLION),
        "eval_count": tokens,
        "eval_duration": int((now - first) * BILLION),
    }


def _calls(reply: ChatReply) -> list[dict[str, Any]]:
    calls = []
    for call in reply.calls:
        try:
            arguments = parse_json(call.arguments or "{}")
        except ValueError:  # cut off
            arguments = {}
        function = {"name": call.name, "arguments": arguments}
        calls.append({"id": call.call_id, "function": function})
    return calls


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _failed(error: ApiError) -> str:
    return _line(error.body(OLLAMA_CHAT))


def _content(text: str, thought: str, *, as_text: bool) -> dict[str, Any]:
    """Return a text and a thought as a chat's message, or as a completion's response."""
    thinking = {"thinking": thought} if thought else {}
    if as_text:
        return {"response": text, **thinking}
    return {"message": {"role": "assistant", "content": text, **thinking}}


def _last(record: RequestRecord, reply: ChatReply, prompt: int) -> dict[str, Any]:
    reason = "length" if reply.finish == "length" else "stop"
    return {"done": True, "done_reason": reason, **_counts(record, prompt, reply.tokens)}


async def _chat_response(
    reply: PendingReply,
    request: Request,
    *,
    stream_it: bool,
    then: Callable[[], object],
    as_text: bool = False,
) -> Response:
    record = request_record(request)
    if stream_it:
        begun = await start_chat(reply, request)
        lines = and_then(_chat_lines(begun, record, as_text=as_text), then)
        return stream(lines, reply, record, done="", failed=_failed, media_type=LINES)
    started, (whole,) = await collect_chat(reply, request)
    then()
    content = _content(whole.text, whole.thought, as_text=as_text)
    if whole.calls and not as_text:
        content["message"]["tool_calls"] = _calls(whole)
    answer = {"model": started.model, "created_at": now(), **content}
    if whole.has_logprobs:
        answer["logprobs"] = whole.logprobs
    answer |= _last(record, whole, prompt_tokens(started))
    return JSONResponse(answer, headers=ignored_options(record))


async def _chat_lines(
    begun: ChatStream, record: RequestRecord, *, as_text: bool
) -> AsyncIterator[str]:
    """Yield a line for each piece; a call is sent whole, as Ollama has no other form."""
    (reply,) = begun.replies
    model = begun.started.model
    async for _, new, chunk in begun.deltas():
        logprobs = (reply.add_logprobs(chunk) or {}).get("content")
        if new.text or new.thought or logprobs:
            content = _content(new.text, new.thought, as_text=as_text)
            more = {"logprobs": logprobs} if logprobs else {}
            yield _line({"model": model, "created_at": now(), **content, **more, "done": False})
    content = _content("", "", as_text=as_text)
    if reply.calls and not as_text:
        message = {**content["message"], "tool_calls": _calls(reply)}
        yield _line({"model": model, "created_at": now(), "message": message, "done": False})
    last = _last(record, reply, prompt_tokens(begun.started))
    yield _line({"model": model, "created_at": now(), **content, **last})


async def _raw_response(
    reply: PendingReply, request: Request, *, stream_it: bool, then: Callable[[], object]
) -> Response:
    record = request_record(request)
    if stream_it:
        first = await reply.start(request)
        assert isinstance(first, ReplyChunk), "there is one reply"
        lines = and_then(_raw_lines(reply, first, record), then)
        return stream(lines, reply, record, done="", failed=_failed, media_type=LINES)
    started, chunks = await collect(reply, request)
    then()
    text = "".join(chunk.piece.text for chunk in chunks)
    answer = {"model": started.model, "created_at": now(), "response": text}
    answer |= _raw_last(record, chunks[-1], prompt_tokens(started))
    return JSONResponse(answer, headers=ignored_options(record))


async def _raw_lines(
    reply: PendingReply, first: ReplyChunk, record: RequestRecord
) -> AsyncIterator[str]:
    started = reply.started
    assert started is not None
    base = {"model": started.model}
    chunk = first
    async for chunk in reply.chunks(first):
        if chunk.piece.text:
            fields = {**base, "created_at": now(), "response": chunk.piece.text, "done": False}
            yield _line(fields)
    last = _raw_last(record, chunk, prompt_tokens(started))
    yield _line({**base, "created_at": now(), "response": "", **last})


def _raw_last(record: RequestRecord, chunk: ReplyChunk, prompt: int) -> dict[str, Any]:
    reason = FINISH[chunk.piece.finish or "stop"]
    return {"done": True, "done_reason": reason, **_counts(record, prompt, chunk.piece.tokens)}
