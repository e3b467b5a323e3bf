"""Await the engine's events in a request's own loop, for no longer than its client waits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import ApiError, to_api_error
from gptq_loader_extensions.openai.replies.engine import (
    Ended,
    EngineRequest,
    Failed,
    ReplyChunk,
    Started,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from fastapi import Request

    from gptq_loader_extensions.openai.replies.engine import Event, GenerationEngine, Run
    from gptq_loader_extensions.openai.replies.record import RequestRecord
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["ClientDisconnected", "PendingReply", "collect"]


class ClientDisconnected(Exception):
    """The client disconnected before its answer was ready."""


class PendingReply:
    """The events of one request, from its place in the queue to its end.

    Args:
        engine: generates it.
        model: the model's name; None takes the one that is loaded.
        prepare: called with the model, on a thread that makes prompts.
        timeout: the seconds it may take, its time in the queue included.
        record: records what happens.
        compute: as in `EngineRequest`.
        size: the bytes of the request.
        at_once: as in `EngineRequest`.
        answers_as: what the reply names as its model, where that is an adapter of it.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        model: str | None,
        prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]],
        *,
        timeout: float,
        record: RequestRecord,
        compute: Callable[[LoadedModel, Any], Iterator[None]] | None = None,
        size: int = 0,
        at_once: bool = False,
        answers_as: str | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._engine = engine
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._record = record

        def send(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._request = EngineRequest(
            model, prepare, send, compute=compute, size=size, at_once=at_once
        )
        self._answers_as = answers_as
        self.started: Started | None = None
        self.text = ""
        self.ended = False

    async def start(self, request: Request) -> ReplyChunk | Ended:
        """Queue the request and wait for its first chunk.

        Raises:
            ApiError: it was refused, failed, or took too long.
            ClientDisconnected: the client waits no longer.
        """
        self._engine.submit(self._request)
        first = asyncio.ensure_future(self._first())
        disconnected = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({first, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise ClientDisconnected
            return first.result()
        finally:
            if not first.done() or first.exception() is not None:
                self.cancel()
            for task in (first, disconnected):
                task.cancel()

    async def chunks(self, first: ReplyChunk) -> AsyncIterator[ReplyChunk]:
        """Yield the first chunk and those that follow; leaving the iterator ends the reply.

        Raises:
            ApiError: it failed, or took too long.
        """
        yield first
        try:
            while not isinstance(event := await self._next(), Ended):
                if isinstance(event, ReplyChunk):
                    yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the reply within a token."""
        self.ended = True
        self._engine.cancel(self._request)

    async def _first(self) -> ReplyChunk | Ended:
        while True:
            event = await self._next()
            if isinstance(event, Started):
                if self._answers_as is not None:
                    event = replace(event, model=self._answers_as)
                self.started = event
                self._record.started(event)
            elif isinstance(event, ReplyChunk | Ended):
                return event

    async def _next(self) -> Event:
        try:
            async with asyncio.timeout(max(self._deadline - time.monotonic(), 0)):
                event = await self._events.get()
        except TimeoutError as error:
            raise ApiError(
                504,
                f"this request took longer than the {self._timeout:,.0f} seconds it may; ask for "
                "fewer tokens, or try again when the server has less to do",
                kind="server_error",
                code="timeout",
            ) from error
        if isinstance(event, Failed):
            raise to_api_error(event.error) from event.error
        if isinstance(event, Ended):
            self.ended = True
        if isinstance(event, ReplyChunk):
            self._record.chunk(event)
            self.text += event.piece.text
        return event


async def collect(reply: PendingReply, request: Request) -> tuple[Started, list[ReplyChunk]]:
    """Wait for all chunks of a reply; a client that disconnects ends it.

    Raises:
        ApiError: it was refused, failed, or took too long.
        ClientDisconnected: nobody waits for it any longer.
    """
    first = await reply.start(request)
    assert reply.started is not None
    if isinstance(first, Ended):
        return reply.started, []

    async def collect_chunks() -> list[ReplyChunk]:
        return [chunk async for chunk in reply.chunks(first)]

    rest = asyncio.ensure_future(collect_chunks())
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({rest, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not rest.done():
            raise ClientDisconnected
        return reply.started, await rest
    finally:
        reply.cancel()
        for task in (rest, disconnected):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
