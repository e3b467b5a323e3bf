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
from gptq_loader_extensions.openai.replies.prompt_tokenizer import prompt_tokenizer
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import collect
from gptq_loader_extensions.openai.replies.runs import make_runs
from gptq_loader_extensions.openai.replies.structured import make_grammar
from gptq_loader_extensions.openai.replies.tools import offer_tools, template_messages
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.routes.sse import event, ignored_options, stream
from gptq_loader_extensions.openai.schema.openapi import ERRORS, EVENTS
from gptq_loader_extensions.openai.schema.paths import CHAT
from gptq_loader_extensions.openai.schema.schemas import ChatRequest
from gptq_loader_extensions.openai.schema.unsupported import check_extra, check_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gptq_loader_extensions.openai.replies.engine import Started
    from gptq_loader_extensions.openai.replies.prompt_tokenizer import PromptTokenizer
    from gptq_loader_extensions.openai.replies.reply_events import PendingReply
    from gptq_loader_extensions.openai.replies.token_text import TokenText
    from gptq_loader_extensions.openai.replies.tools import FunctionCall, ToolParser
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["FINISH", "chat_routes", "usage"]

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


class ChatChoice:
    """One reply as it grows: its text, its calls, why it ended.

    Args:
        prepared: how to read it.
    """

    def __init__(self, prepared: PreparedChat) -> None:
        self._parser = prepared.make_parser()
        self._token_text = prepared.token_text
        self._aligner: LogprobAligner | None = None
        if self._token_text is not None:
            self._aligner = LogprobAligner(self._token_text, prepared.end_ids)
        self.text = ""
        self.calls: list[FunctionCall] = []
        self.logprobs: list[dict[str, Any]] = []
        self.tokens = 0
        self.finish: str | None = None

    def add(self, chunk: ReplyChunk) -> dict[str, Any]:
        """Add a chunk; return the delta that a stream sends for it."""
        text, calls = self._parser.feed(chunk.piece.text)
        if chunk.piece.finish is not None:
            last_text, last_calls = self._parser.finish()
            text, calls = text + last_text, [*calls, *last_calls]
        self.text += text
        self.calls += calls
        self.tokens = chunk.piece.tokens
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            first = len(self.calls) - len(calls)
            delta["tool_calls"] = [
                {"index": first + i, **call.to_json()} for i, call in enumerate(calls)
            ]
        if chunk.piece.finish is not None:
            self.finish = "tool_calls" if self.calls else FINISH[chunk.piece.finish]
        return delta

    def add_logprobs(self, chunk: ReplyChunk) -> dict[str, Any] | None:
        """Add a chunk's log-probabilities and return them, where they are requested."""
        if self._aligner is None or self._token_text is None:
            return None
        logprobs = chat_logprobs(self._token_text, self._aligner.add(chunk))
        self.logprobs += logprobs["content"]
        return logprobs

    def message(self) -> dict[str, Any]:
        """Return the whole reply as a message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message["content"] = self.text or None
            message["tool_calls"] = [call.to_json() for call in self.calls]
        return message

    def to_json(self, index: int) -> dict[str, Any]:
        """Return the whole reply as a choice."""
        logprobs = None
        if self._aligner is not None:
            logprobs = {"content": self.logprobs, "refusal": None}
        return {
            "index": index,
            "message": self.message(),
            "logprobs": logprobs,
            "finish_reason": self.finish,
        }


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """What a request needs once its model is known.

    Attributes:
        make_parser: makes what finds the calls in a reply.
        end_ids: the tokens that end a reply.
        token_text: writes single tokens; None where no log-probabilities are requested.
    """

    make_parser: Callable[[], ToolParser]
    end_ids: frozenset[int]
    token_text: TokenText | None


def chat_routes(server: Server) -> APIRouter:
    """Return the route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(CHAT, responses=ERRORS | EVENTS, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        record = request_record(request)
        record.ignored = check_extra(body)
        for i, message in enumerate(body.messages):
            check_message(message, i)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", param="top_logprobs")
        reply = await server.new_reply(
            request, body.model, lambda model: _prepare(server, body, model)
        )
        base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        if not body.stream:
            started, chunks = await collect(reply, request)
            return JSONResponse(_completion(started, chunks, base), headers=ignored_options(record))
        first = await reply.start(request)
        assert isinstance(first, ReplyChunk), "a chat has at least one reply"
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return stream(_events(reply, first, base, with_usage=with_usage), reply, record)

    return router


def _prepare(
    server: Server, body: ChatRequest, model: LoadedModel
) -> tuple[PreparedChat, list[Run]]:
    tokenizer = prompt_tokenizer(model)
    messages = template_messages(body.messages)
    _check_last(messages, tokenizer)
    template, make_parser = offer_tools(body, model)
    ids = template.encode(messages, model.tokenizer)
    model.check_fits(ids)
    runs = make_runs(
        body,
        model,
        ids,
        max_tokens=server.max_tokens(body.max_completion_tokens or body.max_tokens, model),
        stop=template.stop,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=make_grammar(body.response_format, tokenizer.grammar, begin=len(ids)),
    )
    end_ids = model.end_ids(template.stop)
    token_text = server.token_text(model) if body.logprobs else None
    return PreparedChat(make_parser, end_ids, token_text), runs


def _check_last(messages: list[dict[str, Any]], tokenizer: PromptTokenizer) -> None:
    """Refuse what the user says last by its length, before it is rendered: every prompt has it.

    Raises:
        PromptTooLong: it cannot fit.
    """
    contents = [message["content"] for message in messages if message["role"] == "user"]
    if contents and isinstance(contents[-1], str):
        tokenizer.check_length(contents[-1].strip())  # as some templates do


def _completion(started: Started, chunks: list[ReplyChunk], base: dict[str, Any]) -> dict[str, Any]:
    choices = [ChatChoice(started.value) for _ in started.runs]
    for chunk in chunks:
        choices[chunk.index].add(chunk)
        choices[chunk.index].add_logprobs(chunk)
    return {
        **base,
        "object": "chat.completion",
        "model": started.model,
        "choices": [choice.to_json(i) for i, choice in enumerate(choices)],
        "usage": usage(started, [choice.tokens for choice in choices]),
    }


async def _events(
    reply: PendingReply, first: ReplyChunk, base: dict[str, Any], *, with_usage: bool
) -> AsyncIterator[str]:
    started = reply.started
    assert started is not None
    base = {**base, "object": "chat.completion.chunk", "model": started.model}
    no_usage = {"usage": None} if with_usage else {}
    choices = [ChatChoice(started.value) for _ in started.runs]

    def chunk_event(index: int, delta: dict[str, Any], **fields: Any) -> str:  # noqa: ANN401
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return event({**base, "choices": [{**choice, **fields}], **no_usage})

    for i in range(len(choices)):
        yield chunk_event(i, {"role": "assistant", "content": ""})
    async for chunk in reply.chunks(first):
        choice = choices[chunk.index]
        delta, logprobs = choice.add(chunk), choice.add_logprobs(chunk)
        if delta or (logprobs and logprobs["content"]):
            yield chunk_event(chunk.index, delta, logprobs=logprobs)
        if choice.finish is not None:
            yield chunk_event(chunk.index, {}, finish_reason=choice.finish)
    if with_usage:
        counts = usage(started, [choice.tokens for choice in choices])
        yield event({**base, "choices": [], "usage": counts})


def usage(started: Started, tokens: list[int]) -> dict[str, int]:
    """Count a request's tokens; a prompt that is answered several times counts once.

    Args:
        started: the request's prompts.
        tokens: how many tokens each reply has.
    """
    prompts = {id(run.ids): len(run.ids) for run in started.runs}
    total = sum(prompts.values())
    return {
        "prompt_tokens": total,
        "completion_tokens": sum(tokens),
        "total_tokens": total + sum(tokens),
    }
