"""POST /v1/completions: prompts as they are, without a template."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.engine import ReplyChunk, Run
from gptq_loader_extensions.openai.replies.logprobs import LogprobAligner, completion_logprobs
from gptq_loader_extensions.openai.replies.prompts import score_prompt
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import collect
from gptq_loader_extensions.openai.replies.runs import make_runs
from gptq_loader_extensions.openai.routes.chat import FINISH, usage
from gptq_loader_extensions.openai.routes.sse import event, stream, told
from gptq_loader_extensions.openai.schema.openapi import ERRORS, EVENTS
from gptq_loader_extensions.openai.schema.schemas import CompletionRequest
from gptq_loader_extensions.openai.schema.unsupported import check_extra

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gptq_loader_extensions.openai.replies.engine import Started
    from gptq_loader_extensions.openai.replies.reply_events import PendingReply
    from gptq_loader_extensions.openai.replies.scores import ScoredToken
    from gptq_loader_extensions.openai.replies.token_text import TokenText
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["check_ids", "completion_routes", "cut_prompt"]

MAX_TOKENS = 16  # OpenAI's, where a client names none


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and what was found out about it.

    Attributes:
        text: what an echo repeats; "" without one.
        steps: its tokens' probabilities, where an echo is to have them.
        tokens: how many it has.
    """

    text: str
    steps: Sequence[ScoredToken]
    tokens: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was found out about a request with its model at hand.

    Attributes:
        prompts: in order.
        copies: how many replies each has.
        top: how many likeliest tokens to report; None reports nothing.
        words: writes single tokens; None where no probabilities were asked for.
        ends: the tokens that end a reply.
    """

    prompts: Sequence[Prompt]
    copies: int
    top: int | None
    words: TokenText | None
    ends: frozenset[int]


class Choice:
    """One reply as it grows, after the prompt where that is repeated.

    Args:
        prepared: what was found out about the request.
        index: which reply it is.
    """

    def __init__(self, prepared: Prepared, index: int) -> None:
        self._prepared = prepared
        self._prompt = prepared.prompts[index // prepared.copies]
        self._words = prepared.words
        self._aligned = None if self._words is None else LogprobAligner(self._words, prepared.ends)
        self._steps: list[ScoredToken] = list(self._prompt.steps)
        self._said = 0  # characters whose tokens were reported
        self.index = index
        self.text = self._prompt.text
        self.tokens = 0
        self.finish: str | None = None

    def take(self, said: ReplyChunk) -> str:
        """Take a piece; give its text."""
        self.text += said.piece.text
        self.tokens = said.piece.tokens
        if said.piece.finish is not None:
            self.finish = FINISH[said.piece.finish]
        if self._aligned is not None:
            self._steps += self._aligned.add(said)
        return said.piece.text

    def logprobs(self) -> dict[str, Any] | None:
        """Give the probabilities of the tokens since the last call."""
        words, top = self._words, self._prepared.top
        if words is None or top is None:
            return None
        steps, self._steps = self._steps, []
        begin = self._said
        self._said += sum(len(words.text(it.token)) for it in steps)
        return completion_logprobs(words, steps, begin=begin, top=top)

    def to_json(self, text: str) -> dict[str, Any]:
        """Give a choice with this text."""
        return {
            "index": self.index,
            "text": text,
            "logprobs": self.logprobs(),
            "finish_reason": self.finish,
        }


def completion_routes(server: Server) -> APIRouter:
    """Make the route."""
    router = APIRouter()

    @router.post("/v1/completions", responses=ERRORS | EVENTS, response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts."""
        record = request_record(request)
        record.ignored = check_extra(body)
        prompts = _prompts(body)
        if len(prompts) * (body.n or 1) > 64:
            raise invalid("one request may have 64 replies; send fewer prompts, or a smaller n")
        reply = await server.reply(
            request, body.model, lambda model: _prepare(server, body, prompts, model)
        )
        about = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        if not body.stream or body.max_tokens == 0:
            ready, said = await collect(reply, request)
            answer = _completion(ready, said, about)
            return JSONResponse(answer, headers=told(record))
        first = await reply.start(request)
        assert isinstance(first, ReplyChunk), "a completion has at least one reply"
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return stream(_chunks(reply, first, about, with_usage=with_usage), reply, record)

    return router


def check_ids(ids: Sequence[int], model: LoadedModel) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        ApiError: one of them is too great.
    """
    if max(ids) >= len(model.tokenizer):
        raise invalid(
            f"this model has no token {max(ids):,}; its tokens are 0 to {len(model.tokenizer) - 1}",
            param="prompt",
        )


def cut_prompt(ids: list[int], model: LoadedModel, *, length: int, reply: int) -> list[int]:
    """Leave out a prompt's beginning, as Kobold's clients expect, to make room for a reply."""
    room = max(min(length, model.context) - reply, 1)
    if len(ids) <= room:
        return ids
    begins = ids[:1] == [model.tokenizer.bos_token_id]
    return ids[:1] + ids[len(ids) - room + 1 :] if begins and room > 1 else ids[-room:]


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """Give the prompts, however they were sent."""
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


def _prepare(
    server: Server,
    body: CompletionRequest,
    prompts: Sequence[str | list[int]],
    model: LoadedModel,
) -> tuple[Prepared, list[Run]]:
    asked = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    most = server.most_tokens(asked, model)
    found, runs = [], []
    for prompt in prompts:
        ids = _ids(body, prompt, model, reply=most)
        text, steps = "", []
        if body.echo:
            text = prompt if isinstance(prompt, str) else str(model.tokenizer.decode(prompt))
            if body.logprobs is not None:
                steps = score_prompt(model, ids, body.logprobs)
        found.append(Prompt(text, steps, len(ids)))
        if most:
            runs += make_runs(body, model, ids, max_tokens=most, top_logprobs=body.logprobs)
    ends = model.end_ids()
    copies = (body.n or 1) if most else 1
    words = None if body.logprobs is None else server.words_of(model)
    return Prepared(found, copies, body.logprobs, words, ends), runs


def _ids(
    body: CompletionRequest, prompt: str | list[int], model: LoadedModel, *, reply: int
) -> list[int]:
    if isinstance(prompt, list):
        check_ids(prompt, model)
        ids = prompt
    else:
        ids = model.tokenizer(prompt, verbose=False)["input_ids"] or model.encode(prompt)
    if body.truncation_length is not None:
        return cut_prompt(ids, model, length=body.truncation_length, reply=reply)
    model.check_fits(ids)
    return ids


def _completion(ready: Started, said: list[ReplyChunk], about: dict[str, Any]) -> dict[str, Any]:
    prepared: Prepared = ready.value
    choices = [Choice(prepared, i) for i in range(len(prepared.prompts) * prepared.copies)]
    for piece in said:
        choices[piece.index].take(piece)
    if not ready.runs:  # no new tokens were asked for
        for choice in choices:
            choice.finish = "length"
    counted = usage(ready, [it.tokens for it in choices])
    counted["prompt_tokens"] = sum(it.tokens for it in prepared.prompts)
    counted["total_tokens"] = counted["prompt_tokens"] + counted["completion_tokens"]
    return {
        **about,
        "object": "text_completion",
        "model": ready.model,
        "choices": [it.to_json(it.text) for it in choices],
        "usage": counted,
    }


async def _chunks(
    reply: PendingReply, first: ReplyChunk, about: dict[str, Any], *, with_usage: bool
) -> AsyncIterator[str]:
    ready = reply.started
    assert ready is not None
    head = {**about, "object": "text_completion", "model": ready.model}
    more = {"usage": None} if with_usage else {}
    choices = [Choice(ready.value, i) for i in range(len(ready.runs))]
    for choice in choices:
        if choice.text:  # an echo
            yield event({**head, "choices": [choice.to_json(choice.text)], **more})
    async for said in reply.chunks(first):
        choice = choices[said.index]
        text = choice.take(said)
        if text or choice.finish is not None:
            yield event({**head, "choices": [choice.to_json(text)], **more})
    if with_usage:
        counted = usage(ready, [it.tokens for it in choices])
        yield event({**head, "choices": [], "usage": counted})
