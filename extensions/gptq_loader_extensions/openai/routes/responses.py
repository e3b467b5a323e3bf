"""POST /v1/responses, and the responses that are kept."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from gptq_loader_extensions.openai.errors import ApiError, invalid
from gptq_loader_extensions.openai.replies.chat_prompt import encode_chat
from gptq_loader_extensions.openai.replies.chat_reply import ChatReply
from gptq_loader_extensions.openai.replies.input_items import as_items, list_page
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import collect
from gptq_loader_extensions.openai.replies.response_items import ResponseItems
from gptq_loader_extensions.openai.replies.response_store import StoredResponse
from gptq_loader_extensions.openai.routes.chat_request import (
    check_chat,
    new_chat,
    prompt_tokens,
    start_chat,
)
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.routes.sse import event, ignored_options, stream
from gptq_loader_extensions.openai.schema.openapi import ERRORS, EVENTS
from gptq_loader_extensions.openai.schema.paths import RESPONSES
from gptq_loader_extensions.openai.schema.responses import ResponsesRequest, read_responses
from gptq_loader_extensions.openai.schema.unsupported import check_extra

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gptq_loader_extensions.openai.replies.engine import Started
    from gptq_loader_extensions.openai.routes.chat_request import ChatStream
    from gptq_loader_extensions.openai.schema.responses import ResponsesChat
    from gptq_loader_extensions.openai.server import Server

__all__ = ["responses_routes"]

REFERENCE = "item_reference"  # of the input: an item that an earlier response has


def responses_routes(server: Server) -> APIRouter:
    """Return the routes."""
    router = APIRouter(responses=ERRORS, route_class=JsonRoute)

    @router.post(RESPONSES, responses=EVENTS, response_model=None)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, or go on with one."""
        body = _with_items(server, body)
        read, ignored = _read(server, body)
        reply = await new_chat(server, request, read.chat, ignored=ignored)
        answer = PendingResponse(server, body, read)
        if body.stream:
            begun = await start_chat(reply, request)
            events = _events(begun, answer)
            return stream(events, reply, request_record(request), done="", failed=answer.failed)
        started, chunks = await collect(reply, request)
        chat_reply = ChatReply(started.value)
        items = ResponseItems(chat_reply, read.custom)
        for chunk in chunks:
            for _ in items.add(chat_reply.add(chunk)):
                pass
            chat_reply.add_logprobs(chunk)
        for _ in items.finish():
            pass
        whole = answer.finished(started, chat_reply, items)
        return JSONResponse(whole, headers=ignored_options(request_record(request)))

    @router.post(f"{RESPONSES}/input_tokens")
    async def input_tokens(body: ResponsesRequest, request: Request) -> dict[str, Any]:
        """Count the tokens of a conversation."""
        read, _ = _read(server, _with_items(server, body))
        check_chat(read.chat)
        ids = await server.with_prompts(
            request, lambda model: encode_chat(read.chat, model), model=body.model
        )
        return {"object": "response.input_tokens", "input_tokens": len(ids)}

    @router.get(f"{RESPONSES}/{{response_id}}")
    async def find(response_id: str) -> dict[str, Any]:
        """Return a response that was kept."""
        return _find(server, response_id).answer

    @router.get(f"{RESPONSES}/{{response_id}}/input_items")
    async def input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(max_length=200)] = None,
    ) -> dict[str, Any]:
        """List what a response that was kept answers, the newest item first."""
        items = list(_find(server, response_id).input_items)
        return list_page(items if order == "asc" else items[::-1], limit=limit, after=after)

    @router.delete(f"{RESPONSES}/{{response_id}}")
    async def delete(response_id: str) -> dict[str, Any]:
        """Forget a response."""
        _find(server, response_id)
        server.responses.remove(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return router


class PendingResponse:
    """A response, from its request to its end.

    Args:
        server: what the routes share.
        body: the request.
        read: the same as a chat.
    """

    def __init__(self, server: Server, body: ResponsesRequest, read: ResponsesChat) -> None:
        self._server, self._body, self._read = server, body, read
        self._events = 0
        self._base = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {
                "effort": body.reasoning.effort if body.reasoning else None,
                "summary": None,
            },
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": _text(body),
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": body.truncation or "disabled",
            "user": body.user,
        }

    @property
    def custom(self) -> frozenset[str]:
        """The tools whose calls have a text in place of arguments."""
        return self._read.custom

    def begun(self, started: Started) -> dict[str, Any]:
        """Return the response before anything of it is there."""
        return self._answer(started.model, "in_progress", [])

    def finished(self, started: Started, reply: ChatReply, items: ResponseItems) -> dict[str, Any]:
        """Return the whole response, and keep it unless the client forbids it."""
        cut = reply.finish == "length"
        answer = self._answer(started.model, "incomplete" if cut else "completed", items.items)
        if cut:
            answer["incomplete_details"] = {"reason": "max_output_tokens"}
        prompt = prompt_tokens(started)
        answer["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": reply.tokens,
            "output_tokens_details": {"reasoning_tokens": reply.thought_tokens},
            "total_tokens": prompt + reply.tokens,
        }
        if self._body.store is not False:
            messages = [*self._read.messages, _message(reply)]
            before = self._server.responses.find(self._body.previous_response_id or "")
            earlier = () if before is None else (*before.input_items, *before.answer["output"])
            inputs = (*earlier, *as_items(self._body.input))
            size = sum(len(str(message)) for message in (*messages, *inputs))
            self._server.responses.add(StoredResponse(answer, messages, size, inputs))
        return answer

    def write(self, fields: dict[str, Any]) -> str:
        """Write an event, with its number."""
        numbered = {**fields, "sequence_number": self._events}
        self._events += 1
        return event(numbered, name=fields["type"])

    def failed(self, error: ApiError) -> str:
        """Write the event of an error on the way."""
        fault = {"code": error.code or error.kind, "message": error.message}
        response = {**self._answer(None, "failed", []), "error": fault}
        return self.write({"type": "response.failed", "response": response})

    def _answer(
        self, model: str | None, status: str, output: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return {
            **self._base,
            "model": model,
            "status": status,
            "incomplete_details": None,
            "output": output,
            "usage": None,
        }


def _read(server: Server, body: ResponsesRequest) -> tuple[ResponsesChat, tuple[str, ...]]:
    """Return a request as a chat, after the response it goes on from; and what is ignored of it.

    Raises:
        ApiError: there is no such response, or something of it is not understood here.
    """
    ignored = check_extra(body)
    if (body.n or 1) > 1:
        raise invalid("a response has one reply; leave n out", param="n")
    before: tuple[dict[str, Any], ...] = ()
    if body.previous_response_id is not None:
        stored = server.responses.find(body.previous_response_id)
        if stored is None:
            raise ApiError(
                400,
                f"the response {body.previous_response_id!r} is not kept here, or no longer; send "
                "the conversation as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        before = tuple(stored.messages)
    read = read_responses(body, before)
    return read, (*ignored, *read.ignored)


def _with_items(server: Server, body: ResponsesRequest) -> ResponsesRequest:
    """Put items of earlier responses in the place of the references to them.

    Raises:
        ApiError: one is not kept here.
    """
    if not isinstance(body.input, list):
        return body
    items = [
        _item(server, item.get("id"), f"input.{i}") if item.get("type") == REFERENCE else item
        for i, item in enumerate(body.input)
    ]
    return body.model_copy(update={"input": items})


def _item(server: Server, item_id: object, param: str) -> dict[str, Any]:
    item = server.responses.find_item(item_id) if isinstance(item_id, str) else None
    if item is None:
        raise ApiError(
            404,
            f"{param}: the item {str(item_id)[:200]!r} is not kept here, or no longer; send it "
            "whole, as clients do with store: false",
            param=param,
            code="item_not_found",
        )
    return item


def _find(server: Server, response_id: str) -> StoredResponse:
    stored = server.responses.find(response_id)
    if stored is None:
        raise ApiError(
            404,
            f"the response {response_id[:200]!r} is not kept here, or no longer",
            param="response_id",
            code="response_not_found",
        )
    return stored


def _text(body: ResponsesRequest) -> dict[str, Any]:
    options = body.text
    if options is None:
        return {"format": {"type": "text"}}
    written = options.model_dump(exclude_none=True, by_alias=True)
    return {"format": {"type": "text"}, **written}


def _message(reply: ChatReply) -> dict[str, Any]:
    """Return a reply as a message of the conversation that goes on from it."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.thought:
        message["reasoning_content"] = reply.thought
    if reply.calls:
        message["tool_calls"] = [call.to_json() for call in reply.calls]
    return message


async def _events(begun: ChatStream, answer: PendingResponse) -> AsyncIterator[str]:
    started, (reply,) = begun.started, begun.replies
    items = ResponseItems(reply, answer.custom)
    empty = answer.begun(started)
    yield answer.write({"type": "response.created", "response": empty})
    yield answer.write({"type": "response.in_progress", "response": empty})
    async for _, new, chunk in begun.deltas():
        reply.add_logprobs(chunk)
        for fields in items.add(new):
            yield answer.write(fields)
    for fields in items.finish():
        yield answer.write(fields)
    whole = answer.finished(started, reply, items)
    yield answer.write({"type": f"response.{whole['status']}", "response": whole})
