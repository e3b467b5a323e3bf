"""Have Ray Serve's proxy ask another replica when one ends before it has answered.

Ray Serve calls `middlewares` in each of its proxies where this is in its environment:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=gptq_loader_extensions.ray.proxy.middlewares

Only the routes that write replies are touched; others of the same cluster pass unchanged.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from gptq_loader_extensions.openai.errors import ApiError
from gptq_loader_extensions.openai.routes.sse import DONE, event
from gptq_loader_extensions.openai.schema.paths import REPLY_PATHS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.middleware import Middleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CALLBACK", "AnotherReplica", "middlewares"]

CALLBACK = "gptq_loader_extensions.ray.proxy.middlewares"
TRIES = 4
PAUSE = 0.5  # seconds, for Ray to notice which replica is gone
MOST_KEPT = 16 * 2**20  # bytes of a request, to send it again
RETRY = {"Retry-After": "5"}
TYPE = b"content-type"
NUMBER = b"x-request-id"


def middlewares() -> list[Middleware]:
    """List what each proxy puts before its own work."""
    from starlette.middleware import Middleware

    return [Middleware(AnotherReplica)]


class AnotherReplica:
    """Ask again while nothing of an answer was sent; say in words what cannot be mended.

    Args:
        app: Ray Serve's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, as often as it takes."""
        if scope["type"] != "http" or not scope["path"].endswith(REPLY_PATHS):
            await self._app(scope, receive, send)
            return
        request, answer = _Request(receive), _Answer(send)
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(PAUSE)
            await self._app({**scope, "headers": [*scope["headers"]]}, request.again(), answer)
            if answer.began or request.gone or not request.kept:
                break
        if not request.gone:
            await answer.end()


class _Request:
    """What a client sent, to be read more than once."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._heard: list[Message] = []
        self._size = 0
        self.gone = False

    @property
    def kept(self) -> bool:
        """Whether all of it is here still."""
        return self._size <= MOST_KEPT

    def again(self) -> Receive:
        """Give what reads it from its beginning."""
        heard = iter([*self._heard])

        async def receive() -> Message:
            for message in heard:
                return message
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                return message
            self._size += len(message.get("body", b""))
            if self.kept:
                self._heard.append(message)
            return message

        return receive


class _Answer:
    """What a client is sent, and how far that has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._refused: ApiError | None = None
        self._is_stream = False
        self._ended = False
        self.began = False

    async def __call__(self, message: Message) -> None:
        """Pass a message on; what the proxy itself refuses is kept, to be said in our words."""
        if self._refused is not None:
            return
        if message["type"] == "http.response.start":
            self.began = True
            content = next((it for name, it in message["headers"] if name.lower() == TYPE), b"")
            if message["status"] >= 400 and content.startswith(b"text/plain"):  # never ours
                self._refused = _in_words(message["status"])
                return
            self._is_stream = content.startswith(b"text/event-stream")
            message = {**message, "headers": _numbered_once(message["headers"])}
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def end(self) -> None:
        """Say what has not been said: that there is no answer, or no more of it."""
        if not self.began or self._refused is not None:
            await self._refuse(self._refused or _lost("this request"))
        elif self._is_stream and not self._ended:
            told = event(_lost("the rest of this reply").body()) + DONE
            await self._send({"type": "http.response.body", "body": told.encode()})

    async def _refuse(self, error: ApiError) -> None:
        headers = [
            (TYPE, b"application/json"),
            *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
        ]
        body = json.dumps(error.body()).encode()
        await self._send(
            {"type": "http.response.start", "status": error.status, "headers": headers}
        )
        await self._send({"type": "http.response.body", "body": body})


def _numbered_once(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Leave the replica's number for a request, which its log has, and drop the proxy's."""
    own = [it for it in headers if it[0].lower() == NUMBER]
    return [it for it in headers if it[0].lower() != NUMBER] + own[:1]


def _lost(what: str) -> ApiError:
    return ApiError(
        503,
        f"the replica that had {what} has ended; ask again in a moment",
        kind="server_error",
        code="replica_lost",
        headers=RETRY,
    )


def _in_words(status: int) -> ApiError:
    """Say what Ray Serve's proxy refused for, by its status."""
    match status:
        case 429:
            return ApiError(
                429,
                "too many requests are waiting already; try again in a moment",
                kind="rate_limit_error",
                code="queue_full",
                headers=RETRY,
            )
        case 408:
            return ApiError(
                504,
                "this request took longer than it may; ask for fewer tokens, or try again when "
                "there is less to do",
                kind="server_error",
                code="timeout",
            )
        case _:
            return ApiError(
                503,
                "no replica is ready; ask again in a moment",
                kind="server_error",
                code="not_ready",
                headers=RETRY,
            )
