"""Have a chat answered, for the routes of every API that has chats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.chat_prompt import make_chat_prompt
from gptq_loader_extensions.openai.replies.chat_reply import ChatReply, PreparedChat
from gptq_loader_extensions.openai.replies.engine import ReplyChunk
from gptq_loader_extensions.openai.replies.record import request_record
from gptq_loader_extensions.openai.replies.reply_events import collect
from gptq_loader_extensions.openai.replies.runs import make_runs
from gptq_loader_extensions.openai.schema.unsupported import check_extra, check_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from fastapi import Request

    from gptq_loader_extensions.openai.replies.chat_reply import ReplyDelta
    from gptq_loader_extensions.openai.replies.engine import Run, Started
    from gptq_loader_extensions.openai.replies.reply_events import PendingReply
    from gptq_loader_extensions.openai.schema.schemas import ChatRequest
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["ChatStream", "check_chat", "collect_chat", "new_chat", "prompt_tokens", "start_chat"]


def check_chat(body: ChatRequest) -> tuple[str, ...]:
    """Refuse what is not done here; return the names of the options that are ignored.

    Raises:
        ApiError: something is not.
    """
    ignored = list(check_extra(body))
    for i, message in enumerate(body.messages):
        ignored += check_message(message, i)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", param="top_logprobs")
    return tuple(ignored)


async def new_chat(
    server: Server, request: Request, body: ChatRequest, *, ignored: Sequence[str] = ()
) -> PendingReply:
    """Return the reply to a conversation; it is queued when it is started.

    Args:
        server: what the routes share.
        request: the request.
        body: the conversation.
        ignored: options that have no effect, of an API that names them otherwise.

    Raises:
        ApiError: something of it is not done here, or there is no such model.
    """
    record = request_record(request)
    record.ignored = (*ignored, *check_chat(body))

    def prepare(model: LoadedModel) -> tuple[PreparedChat, list[Run]]:
        prepared, runs = _prepare(server, body, model)
        record.ignored = tuple(sorted({*record.ignored, *prepared.prompt.ignored}))
        return prepared, runs

    return await server.new_reply(request, body.model, prepare)


async def collect_chat(reply: PendingReply, request: Request) -> tuple[Started, list[ChatReply]]:
    """Wait for a whole reply.

    Raises:
        ApiError: it was refused, failed, or took too long.
        ClientDisconnected: nobody waits for it any longer.
    """
    started, chunks = await collect(reply, request)
    replies = [ChatReply(started.value) for _ in started.runs]
    for chunk in chunks:
        replies[chunk.index].add(chunk)
        replies[chunk.index].add_logprobs(chunk)
    return started, replies


class ChatStream:
    """A reply that has begun, and whose chunks come.

    Args:
        reply: the reply.
        first: its first chunk.

    Attributes:
        started: its model and its prompts.
        replies: what has come of each.
    """

    def __init__(self, reply: PendingReply, first: ReplyChunk) -> None:
        assert reply.started is not None
        self._reply, self._first = reply, first
        self.started = reply.started
        self.replies = [ChatReply(self.started.value) for _ in self.started.runs]

    async def deltas(self) -> AsyncIterator[tuple[int, ReplyDelta, ReplyChunk]]:
        """Yield which reply goes on, what is new of it, and the chunk that has it.

        Raises:
            ApiError: it failed, or took too long.
        """
        async for chunk in self._reply.chunks(self._first):
            yield chunk.index, self.replies[chunk.index].add(chunk), chunk


async def start_chat(reply: PendingReply, request: Request) -> ChatStream:
    """Wait for the first chunk of a reply.

    Raises:
        ApiError: it was refused, failed, or took too long.
        ClientDisconnected: the client waits no longer.
    """
    first = await reply.start(request)
    assert isinstance(first, ReplyChunk), "a chat has at least one reply"
    return ChatStream(reply, first)


def prompt_tokens(started: Started) -> int:
    """Count a request's tokens; a prompt that is answered several times counts once."""
    return sum({id(run.ids): len(run.ids) for run in started.runs}.values())


def _prepare(
    server: Server, body: ChatRequest, model: LoadedModel
) -> tuple[PreparedChat, list[Run]]:
    requested = body.max_completion_tokens or body.max_tokens
    prompt = make_chat_prompt(body, model, max_tokens=min(requested or 1, model.context))
    runs = make_runs(
        body,
        model,
        prompt.ids,
        max_tokens=server.max_tokens(requested, model),
        stop=prompt.stop,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        more=prompt.processors,
        shown=prompt.shown,
    )
    prepared = PreparedChat(
        prompt,
        model.end_ids(model.template.stop),
        server.token_text(model) if body.logprobs else None,
        show_thoughts=body.include_reasoning is not False,
    )
    return prepared, runs
