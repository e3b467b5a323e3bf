"""POST /v1/messages and its count of tokens: Anthropic's API, which Claude's clients speak."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_loader_extensions.openai.replies.chat_prompt import encode_chat
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.routes.chat_request import (
    check_chat,
    collect_chat,
    new_chat,
    prompt_tokens,
    start_chat,
)
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.routes.sse import event, ignored_options, stream
from gptq_loader_extensions.openai.schema.anthropic import (
    AnthropicRequest,
    CountRequest,
    read_anthropic,
)
from gptq_loader_extensions.openai.schema.json_text import parse_json
from gptq_loader_extensions.openai.schema.openapi import ANTHROPIC_ERRORS, EVENTS
from gptq_loader_extensions.openai.schema.paths import ANTHROPIC

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from gptq_loader_extensions.openai.errors import ApiError
    from gptq_loader_extensions.openai.replies.chat_reply import ChatReply, ReplyDelta
    from gptq_loader_extensions.openai.replies.engine import Started
    from gptq_loader_extensions.openai.routes.chat_request import ChatStream
    from gptq_loader_extensions.openai.server import Server

__all__ = ["anthropic_routes"]

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def anthropic_routes(server: Server) -> APIRouter:
    """Return the routes."""
    router = APIRouter(responses=ANTHROPIC_ERRORS, route_class=JsonRoute)

    @router.post(ANTHROPIC, responses=EVENTS, response_model=None)
    async def messages(body: AnthropicRequest, request: Request) -> Response:
        """Answer a conversation."""
        chat, ignored = read_anthropic(body)
        reply = await new_chat(server, request, chat, ignored=ignored)
        record = request_record(request)
        stops = body.stop_sequences or []
        if body.stream:
            begun = await start_chat(reply, request)
            return stream(_events(begun, stops), reply, record, done="", failed=_failed)
        started, (whole,) = await collect_chat(reply, request)
        answer = {
            **_message(started),
            "content": _content(whole),
            **_ended(whole, stops),
            "usage": _usage(prompt_tokens(started), whole.tokens),
        }
        return JSONResponse(answer, headers=ignored_options(record))

    @router.post(f"{ANTHROPIC}/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
        """Count the tokens of a conversation."""
        chat, _ = read_anthropic(body)
        check_chat(chat)
        ids = await server.with_prompts(
            request, lambda model: encode_chat(chat, model), model=body.model
        )
        return {"input_tokens": len(ids)}

    return router


def _message(started: Started) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": started.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _content(reply: ChatReply) -> list[dict[str, Any]]:
    """Return a whole reply as blocks."""
    blocks: list[dict[str, Any]] = []
    if reply.thought:
        blocks.append({"type": "thinking", "thinking": reply.thought, "signature": ""})
    if reply.text:
        blocks.append({"type": "text", "text": reply.text})
    blocks += [
        {
            "type": "tool_use",
            "id": call.call_id,
            "name": call.name,
            "input": _input(call.arguments),
        }
        for call in reply.calls
    ]
    return blocks


def _input(arguments: str) -> Any:  # noqa: ANN401 - JSON
    """Return a call's arguments; those of one that was cut off are none."""
    try:
        return parse_json(arguments or "{}")
    except ValueError:
        return {}


def _ended(reply: ChatReply, stops: Sequence[str]) -> dict[str, Any]:
    """Return why a reply ended, which may be a stop text of the client's."""
    assert reply.finish is not None
    reason = STOP_REASONS[reply.finish]
    by_client = reply.finish == "stop" and reply.stop_text in stops
    if by_client:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": reply.stop_text if by_client else None}


def _usage(prompt: int, tokens: int) -> dict[str, int]:
    return {
        "input_tokens": prompt,
        "output_tokens": tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }


def _write(kind: str, **fields: Any) -> str:  # noqa: ANN401 - JSON
    return event({"type": kind, **fields}, name=kind)


def _failed(error: ApiError) -> str:
    return event(error.body(ANTHROPIC), name="error")


class Blocks:
    """The blocks of a reply as they grow."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""

    def add(self, new: ReplyDelta) -> Iterator[str]:
        """Yield the events of what is new."""
        if new.thought:
            yield from self._begin("thinking", thinking="", signature="")
            yield self._delta("thinking_delta", thinking=new.thought)
        if new.text:
            yield from self._begin("text", text="")
            yield self._delta("text_delta", text=new.text)
        for call in new.calls:
            if call.begun is not None:
                yield from self.finish()
                yield from self._begin(
                    "tool_use", id=call.begun.call_id, name=call.begun.name, input={}
                )
            if call.arguments:
                yield self._delta("input_json_delta", partial_json=call.arguments)

    def finish(self) -> Iterator[str]:
        """Yield the end of the block that grows."""
        if not self._open:
            return
        if self._open == "thinking":
            yield self._delta("signature_delta", signature="")
        yield _write("content_block_stop", index=self._index)
        self._open = ""

    def _begin(self, kind: str, **fields: Any) -> Iterator[str]:  # noqa: ANN401 - JSON
        if self._open == kind:
            return
        yield from self.finish()
        self._index += 1
        self._open = kind
        block = {"type": kind, **fields}
        yield _write("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, **fields: Any) -> str:  # noqa: ANN401 - JSON
        return _write("content_block_delta", index=self._index, delta={"type": kind, **fields})


async def _events(begun: ChatStream, stops: Sequence[str]) -> AsyncIterator[str]:
    started, (reply,) = begun.started, begun.replies
    prompt = prompt_tokens(started)
    message = {**_message(started), "usage": _usage(prompt, 0)}
    yield _write("message_start", message=message)
    blocks = Blocks()
    async for _, new, _chunk in begun.deltas():
        for text in blocks.add(new):
            yield text
    for text in blocks.finish():
        yield text
    yield _write("message_delta", delta=_ended(reply, stops), usage=_usage(prompt, reply.tokens))
    yield _write("message_stop")
