"""Wait for work's events in a request's own loop, for no longer than its client waits."""

from __future__ import annotations

import asyncio
import contextlib
import time
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
    from collections.abc import AsyncIterator, Callable, Sequence

    from fastapi import Request

    from gptq_loader_extensions.openai.replies.engine import Event, GenerationEngine, Run
    from gptq_loader_extensions.openai.replies.record import Record
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["ClientGone", "Reply", "whole"]


class ClientGone(Exception):
    """The client hung up before its answer was ready."""


class Reply:
    """The events of one request, from its place in the queue to its end.

    Args:
        engine: does the work.
        model: the model's name; None takes the one that is loaded.
        prepare: called with the model, on the engine's thread.
        timeout: the seconds it may take, the wait included.
        record: takes down what happened.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        model: str | None,
        prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]],
        *,
        timeout: float,
        record: Record,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._engine = engine
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._until = time.monotonic() + timeout
        self._timeout = timeout
        self._record = record

        def send(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._work = EngineRequest(model, prepare, send)
        self.ready: Started | None = None
        self.text = ""
        self.ended = False

    async def start(self, request: Request) -> ReplyChunk | Ended:
        """Queue the work and wait for its first piece.

        Raises:
            ApiError: it was refused, failed, or took too long.
            ClientGone: nobody waits for it any longer.
        """
        self._engine.submit(self._work)
        first = asyncio.ensure_future(self._first())
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({first, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise ClientGone
            return first.result()
        finally:
            if not first.done() or first.exception() is not None:
                self.cancel()
            for task in (first, gone):
                task.cancel()

    async def after(self, first: ReplyChunk) -> AsyncIterator[ReplyChunk]:
        """Give the first piece and those that follow; whoever stops listening ends the work.

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
        """End the work within a token."""
        self.ended = True
        self._engine.cancel(self._work)

    async def _first(self) -> ReplyChunk | Ended:
        while True:
            event = await self._next()
            if isinstance(event, Started):
                self.ready = event
                self._record.started(event)
            elif isinstance(event, ReplyChunk | Ended):
                return event

    async def _next(self) -> Event:
        try:
            async with asyncio.timeout(max(self._until - time.monotonic(), 0)):
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


async def whole(reply: Reply, request: Request) -> tuple[Started, list[ReplyChunk]]:
    """Wait for all of a reply; a client that hangs up ends it.

    Raises:
        ApiError: it was refused, failed, or took too long.
        ClientGone: nobody waits for it any longer.
    """
    first = await reply.start(request)
    assert reply.ready is not None
    if isinstance(first, Ended):
        return reply.ready, []

    async def collect() -> list[ReplyChunk]:
        return [it async for it in reply.after(first)]

    rest = asyncio.ensure_future(collect())
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({rest, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not rest.done():
            raise ClientGone
        return reply.ready, await rest
    finally:
        reply.cancel()
        for task in (rest, gone):
            task.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
