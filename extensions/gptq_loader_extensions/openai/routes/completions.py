"""POST /v1/completions: prompts as they are, without a template."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.chat_reply import FINISH
from gptq_loader_extensions.openai.replies.engine import ReplyChunk, Run
from gptq_loader_extensions.openai.replies.logprobs import LogprobAligner, completion_logprobs
from gptq_loader_extensions.openai.replies.prompt_tokenizer import encode_end, prompt_tokenizer
from gptq_loader_extensions.openai.replies.prompts import score_prompt
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import collect
from gptq_loader_extensions.openai.replies.runs import make_runs
from gptq_loader_extensions.openai.replies.structured import constraint_masks
from gptq_loader_extensions.openai.routes.chat import usage
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.routes.sse import event, ignored_options, stream
from gptq_loader_extensions.openai.schema.openapi import ERRORS, EVENTS
from gptq_loader_extensions.openai.schema.paths import COMPLETIONS
from gptq_loader_extensions.openai.schema.schemas import CompletionRequest
from gptq_loader_extensions.openai.schema.unsupported import check_extra

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from gptq_loader_extensions.openai.replies.engine import Started
    from gptq_loader_extensions.openai.replies.reply_events import PendingReply
    from gptq_loader_extensions.openai.replies.scores import ScoredToken
    from gptq_loader_extensions.openai.replies.token_text import TokenText
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["check_ids", "completion_routes", "cut_prompt", "new_completion"]

MAX_TOKENS = 16  # OpenAI's, where a client names none


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt, and what its reply begins with.

    Attributes:
        echo: its text, where the reply repeats it; else "".
        ids: its tokens.
        scored: the same with log-probabilities, once they are computed, where the echo has them.
    """

    echo: str
    ids: Sequence[int]
    scored: list[ScoredToken] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PreparedCompletion:
    """What a request needs once its model is known.

    Attributes:
        prompts: in order.
        copies: how many replies each has.
        top_logprobs: how many alternatives to report for each token; None reports no token.
        token_text: writes single tokens; None where no log-probabilities are requested.
        end_ids: the tokens that end a reply.
    """

    prompts: Sequence[PreparedPrompt]
    copies: int
    top_logprobs: int | None
    token_text: TokenText | None
    end_ids: frozenset[int]


class CompletionChoice:
    """One reply as it grows, after the prompt where that is repeated.

    Args:
        prepared: the request's prompts and options.
        index: which reply it is.
    """

    def __init__(self, prepared: PreparedCompletion, index: int) -> None:
        prompt = prepared.prompts[index // prepared.copies]
        self._top_logprobs = prepared.top_logprobs
        self._token_text = prepared.token_text
        self._aligner: LogprobAligner | None = None
        if self._token_text is not None:
            self._aligner = LogprobAligner(self._token_text, prepared.end_ids)
        self._unreported = list(prompt.scored)
        self._reported = 0  # characters whose tokens were reported
        self.index = index
        self.text = prompt.echo
        self.tokens = 0
        self.finish: str | None = None

    def add(self, chunk: ReplyChunk) -> str:
        """Add a chunk; return its text."""
        self.text += chunk.piece.text
        self.tokens = chunk.piece.tokens
        if chunk.piece.finish is not None:
            self.finish = FINISH[chunk.piece.finish]
        if self._aligner is not None:
            self._unreported += self._aligner.add(chunk)
        return chunk.piece.text

    def logprobs(self) -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens since the last call."""
        token_text, top = self._token_text, self._top_logprobs
        if token_text is None or top is None:
            return None
        tokens, self._unreported = self._unreported, []
        begin = self._reported
        self._reported += sum(len(token_text.text(scored.token)) for scored in tokens)
        return completion_logprobs(token_text, tokens, begin=begin, top=top)

    def to_json(self, text: str) -> dict[str, Any]:
        """Return a choice with this text."""
        return {
            "index": self.index,
            "text": text,
            "logprobs": self.logprobs(),
            "finish_reason": self.finish,
        }


def completion_routes(server: Server) -> APIRouter:
    """Return the route."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(COMPLETIONS, responses=ERRORS | EVENTS, response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts."""
        record = request_record(request)
        reply = await new_completion(server, request, body)
        base = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        if not body.stream or body.max_tokens == 0:
            started, chunks = await collect(reply, request)
            answer = _completion(started, chunks, base)
            return JSONResponse(answer, headers=ignored_options(record))
        first = await reply.start(request)
        assert isinstance(first, ReplyChunk), "a completion has at least one reply"
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return stream(_events(reply, first, base, with_usage=with_usage), reply, record)

    return router


async def new_completion(server: Server, request: Request, body: CompletionRequest) -> PendingReply:
    """Return the reply to prompts; it is queued when it is started.

    Raises:
        ApiError: something of the request is not done here, or there is no such model.
    """
    request_record(request).ignored = check_extra(body)
    prompts = _prompts(body)
    if len(prompts) * (body.n or 1) > 64:
        raise invalid("one request may have 64 replies; send fewer prompts, or a smaller n")
    return await server.new_reply(
        request,
        body.model,
        lambda model: _prepare(server, body, prompts, model),
        compute=_score if body.echo and body.logprobs is not None else None,
    )


def check_ids(ids: Sequence[int], model: LoadedModel) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        ApiError: one of them is too large.
    """
    if max(ids) >= model.vocab_size:
        raise invalid(
            f"this model has no token {max(ids):,}; its tokens are 0 to {model.vocab_size - 1}",
            param="prompt",
        )


def cut_prompt(ids: list[int], model: LoadedModel, *, length: int, reply: int) -> list[int]:
    """Leave out a prompt's beginning, as Kobold's clients expect, to make room for a reply.

    Args:
        ids: the prompt's tokens.
        model: the model that reads them.
        length: the limit of the prompt and the reply together.
        reply: the limit of the reply.
    """
    limit = max(min(length, model.context) - reply, 1)
    if len(ids) <= limit:
        return ids
    if ids[:1] == [model.tokenizer.bos_token_id] and limit > 1:
        return ids[:1] + ids[len(ids) - limit + 1 :]
    return ids[-limit:]


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts as a list, however they were sent."""
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


def _prepare(
    server: Server,
    body: CompletionRequest,
    prompts: Sequence[str | list[int]],
    model: LoadedModel,
) -> tuple[PreparedCompletion, list[Run]]:
    requested = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    max_tokens = server.max_tokens(requested, model)
    prepared, runs = [], []
    for prompt in prompts:
        ids = _ids(body, prompt, model, reply=max_tokens)
        echo = ""
        if body.echo:
            echo = prompt if isinstance(prompt, str) else str(model.tokenizer.decode(prompt))
        prepared.append(PreparedPrompt(echo, ids))
        if max_tokens:
            masks = constraint_masks(body, prompt_tokenizer(model).grammar, begin=len(ids))
            runs += make_runs(
                body,
                model,
                ids,
                max_tokens=max_tokens,
                top_logprobs=body.logprobs,
                more=masks,
            )
    copies = (body.n or 1) if max_tokens else 1
    token_text = None if body.logprobs is None else server.token_text(model)
    return PreparedCompletion(prepared, copies, body.logprobs, token_text, model.end_ids()), runs


def _ids(
    body: CompletionRequest, prompt: str | list[int], model: LoadedModel, *, reply: int
) -> list[int]:
    if isinstance(prompt, list):
        check_ids(prompt, model)
        ids = prompt
    else:
        ids = _encode(body, prompt, model)
    if body.truncation_length is not None:
        return cut_prompt(ids, model, length=body.truncation_length, reply=reply)
    model.check_fits(ids)
    return ids


def _encode(body: CompletionRequest, prompt: str, model: LoadedModel) -> list[int]:
    """Tokenise a prompt, or the end of one that is to be cut."""
    special = body.add_special_tokens is not False
    if body.truncation_length is not None:
        ids = encode_end(model, prompt, model.context, add_special_tokens=special)
    else:
        ids = model.tokenizer(prompt, verbose=False, add_special_tokens=special)["input_ids"]
    return ids or model.encode(prompt)


def _score(model: LoadedModel, prepared: PreparedCompletion) -> Iterator[None]:
    """Compute the log-probabilities of the prompts, step by step."""
    for prompt in prepared.prompts:
        yield from score_prompt(model, prompt.ids, prepared.top_logprobs or 0, prompt.scored)


def _completion(started: Started, chunks: list[ReplyChunk], base: dict[str, Any]) -> dict[str, Any]:
    prepared: PreparedCompletion = started.value
    count = len(prepared.prompts) * prepared.copies
    choices = [CompletionChoice(prepared, i) for i in range(count)]
    for chunk in chunks:
        choices[chunk.index].add(chunk)
    if not started.runs:  # no new tokens were requested
        for choice in choices:
            choice.finish = "length"
    counts = usage(started, [choice.tokens for choice in choices])
    counts["prompt_tokens"] = sum(len(prompt.ids) for prompt in prepared.prompts)
    counts["total_tokens"] = counts["prompt_tokens"] + counts["completion_tokens"]
    return {
        **base,
        "object": "text_completion",
        "model": started.model,
        "choices": [choice.to_json(choice.text) for choice in choices],
        "usage": counts,
    }


async def _events(
    reply: PendingReply, first: ReplyChunk, base: dict[str, Any], *, with_usage: bool
) -> AsyncIterator[str]:
    started = reply.started
    assert started is not None
    base = {**base, "object": "text_completion", "model": started.model}
    no_usage = {"usage": None} if with_usage else {}
    choices = [CompletionChoice(started.value, i) for i in range(len(started.runs))]
    for choice in choices:
        if choice.text:  # an echo
            yield event({**base, "choices": [choice.to_json(choice.text)], **no_usage})
    async for chunk in reply.chunks(first):
        choice = choices[chunk.index]
        text = choice.add(chunk)
        if text or choice.finish is not None:
            yield event({**base, "choices": [choice.to_json(text)], **no_usage})
    if with_usage:
        counts = usage(started, [choice.tokens for choice in choices])
        yield event({**base, "choices": [], "usage": counts})
