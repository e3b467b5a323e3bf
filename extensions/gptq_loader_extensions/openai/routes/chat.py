"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.engine import ReplyChunk, Run
from gptq_loader_extensions.openai.replies.logprobs import LogprobAligner, chat_logprobs
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import collect
from gptq_loader_extensions.openai.replies.runs import make_runs
from gptq_loader_extensions.openai.replies.structured import make_grammar
from gptq_loader_extensions.openai.replies.tools import offer_tools, template_messages
from gptq_loader_extensions.openai.routes.sse import event, stream, told
from gptq_loader_extensions.openai.schema.openapi import ERRORS, EVENTS
from gptq_loader_extensions.openai.schema.schemas import ChatRequest
from gptq_loader_extensions.openai.schema.unsupported import check_extra, check_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gptq_loader_extensions.openai.replies.engine import Started
    from gptq_loader_extensions.openai.replies.reply_events import PendingReply
    from gptq_loader_extensions.openai.replies.token_text import TokenText
    from gptq_loader_extensions.openai.replies.tools import FunctionCall, ToolParser
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["FINISH", "chat_routes", "usage"]

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


class Choice:
    """One reply as it grows: what it says, what it calls, why it ended.

    Args:
        prepared: how to read it.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._reader = prepared.make_reader()
        self._words = prepared.words
        self._aligned = None if self._words is None else LogprobAligner(self._words, prepared.ends)
        self._called = 0
        self.text = ""
        self.calls: list[FunctionCall] = []
        self.scored: list[dict[str, Any]] = []
        self.tokens = 0
        self.finish: str | None = None

    def take(self, said: ReplyChunk) -> dict[str, Any]:
        """Take a piece; give the delta that a stream sends for it."""
        text, calls = self._reader.feed(said.piece.text)
        if said.piece.finish is not None:
            more, rest = self._reader.finish()
            text, calls = text + more, [*calls, *rest]
        self.text += text
        self.calls += calls
        self.tokens = said.piece.tokens
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            first = len(self.calls) - len(calls)
            delta["tool_calls"] = [
                {"index": first + i, **call.to_json()} for i, call in enumerate(calls)
            ]
        if said.piece.finish is not None:
            self.finish = "tool_calls" if self.calls else FINISH[said.piece.finish]
        return delta

    def score(self, said: ReplyChunk) -> dict[str, Any] | None:
        """Give the probabilities of a piece's tokens, where they were asked for."""
        if self._aligned is None or self._words is None:
            return None
        scored = chat_logprobs(self._words, self._aligned.add(said))
        self.scored += scored["content"]
        return scored

    def message(self) -> dict[str, Any]:
        """Give the whole reply as a message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message["content"] = self.text or None
            message["tool_calls"] = [call.to_json() for call in self.calls]
        return message

    def to_json(self, index: int) -> dict[str, Any]:
        """Give the whole reply as a choice."""
        scored = None if self._words is None else {"content": self.scored, "refusal": None}
        return {
            "index": index,
            "message": self.message(),
            "logprobs": scored,
            "finish_reason": self.finish,
        }


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was found out about a request with its model at hand.

    Attributes:
        make_reader: makes what looks for calls in a reply.
        ends: the tokens that end a reply.
        words: writes single tokens; None where no probabilities were asked for.
    """

    make_reader: Callable[[], ToolParser]
    ends: frozenset[int]
    words: TokenText | None


def chat_routes(server: Server) -> APIRouter:
    """Make the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", responses=ERRORS | EVENTS, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        record = request_record(request)
        record.ignored = check_extra(body)
        for i, message in enumerate(body.messages):
            check_message(message, i)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", param="top_logprobs")
        reply = await server.reply(request, body.model, lambda model: _prepare(server, body, model))
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        if not body.stream:
            ready, said = await collect(reply, request)
            return JSONResponse(_completion(ready, said, about), headers=told(record))
        first = await reply.start(request)
        assert isinstance(first, ReplyChunk), "a chat has at least one reply"
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return stream(_chunks(reply, first, about, with_usage=with_usage), reply, record)

    return router


def _prepare(server: Server, body: ChatRequest, model: LoadedModel) -> tuple[Prepared, list[Run]]:
    template, reader = offer_tools(body, model)
    ids = template.encode(template_messages(body.messages), model.tokenizer)
    ends = model.end_ids(template.stop)
    runs = make_runs(
        body,
        model,
        ids,
        max_tokens=server.most_tokens(body.max_completion_tokens or body.max_tokens, model),
        stop=template.stop,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=make_grammar(
            body.response_format, model, server.grammars, end_ids=ends, begin=len(ids)
        ),
    )
    words = server.words_of(model) if body.logprobs else None
    return Prepared(reader, ends, words), runs


def _completion(ready: Started, said: list[ReplyChunk], about: dict[str, Any]) -> dict[str, Any]:
    choices = [Choice(ready.value) for _ in ready.runs]
    for piece in said:
        choices[piece.index].take(piece)
        choices[piece.index].score(piece)
    return {
        **about,
        "object": "chat.completion",
        "model": ready.model,
        "choices": [it.to_json(i) for i, it in enumerate(choices)],
        "usage": usage(ready, [it.tokens for it in choices]),
    }


async def _chunks(
    reply: PendingReply, first: ReplyChunk, about: dict[str, Any], *, with_usage: bool
) -> AsyncIterator[str]:
    ready = reply.started
    assert ready is not None
    head = {**about, "object": "chat.completion.chunk", "model": ready.model}
    more = {"usage": None} if with_usage else {}
    choices = [Choice(ready.value) for _ in ready.runs]

    def chunk(index: int, delta: dict[str, Any], **fields: Any) -> str:  # noqa: ANN401
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return event({**head, "choices": [{**choice, **fields}], **more})

    for i in range(len(choices)):
        yield chunk(i, {"role": "assistant", "content": ""})
    async for said in reply.chunks(first):
        choice = choices[said.index]
        delta, scored = choice.take(said), choice.score(said)
        if delta or (scored and scored["content"]):
            yield chunk(said.index, delta, logprobs=scored)
        if choice.finish is not None:
            yield chunk(said.index, {}, finish_reason=choice.finish)
    if with_usage:
        counted = usage(ready, [it.tokens for it in choices])
        yield event({**head, "choices": [], "usage": counted})


def usage(ready: Started, tokens: list[int]) -> dict[str, int]:
    """Count a request's tokens; a prompt that is answered several times counts once."""
    prompts = {id(run.ids): len(run.ids) for run in ready.runs}
    total = sum(prompts.values())
    return {
        "prompt_tokens": total,
        "completion_tokens": sum(tokens),
        "total_tokens": total + sum(tokens),
    }
