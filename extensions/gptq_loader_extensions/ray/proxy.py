"""Have Ray Serve's proxy retry on another replica when one dies before it has answered.

Ray Serve calls `middlewares` in each of its proxies where this is in its environment:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=gptq_loader_extensions.ray.proxy.middlewares

Only the routes that write replies are retried; all others of a cluster pass unchanged.
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

__all__ = ["CALLBACK", "RetryMiddleware", "middlewares"]

CALLBACK = "gptq_loader_extensions.ray.proxy.middlewares"
TRIES = 4
PAUSE = 0.5  # seconds, for Ray to notice which replica has died
MAX_REPLAY_BYTES = 16 * 2**20  # of a request that is kept to send it again
RETRY_AFTER = {"Retry-After": "5"}
CONTENT_TYPE = b"content-type"
REQUEST_ID = b"x-request-id"


def middlewares() -> list[Middleware]:
    """List the middleware of each proxy."""
    from starlette.middleware import Middleware

    return [Middleware(RetryMiddleware)]


class RetryMiddleware:
    """Retry while nothing of an answer was sent, and describe errors as the server does.

    Args:
        app: Ray Serve's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, up to `TRIES` times."""
        if scope["type"] != "http" or not scope["path"].endswith(REPLY_PATHS):
            await self._app(scope, receive, send)
            return
        request, response = _Request(receive), _Response(send)
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(PAUSE)
            await self._app({**scope, "headers": [*scope["headers"]]}, request.replay(), response)
            if response.began or request.disconnected or not request.replayable:
                break
        if not request.disconnected:
            await response.finish()


class _Request:
    """What a client sent, kept to be read more than once."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._size = 0
        self.disconnected = False

    @property
    def replayable(self) -> bool:
        """Whether all of it was kept."""
        return self._size <= MAX_REPLAY_BYTES

    def replay(self) -> Receive:
        """Return what reads it from its beginning."""
        kept = iter([*self._messages])

        async def receive() -> Message:
            for message in kept:
                return message
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.disconnected = True
                return message
            self._size += len(message.get("body", b""))
            if self.replayable:
                self._messages.append(message)
            return message

        return receive


class _Response:
    """What a client is sent, and how far that has got."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._error: ApiError | None = None
        self._is_stream = False
        self._ended = False
        self.began = False

    async def __call__(self, message: Message) -> None:
        """Forward a message; keep a refusal of the proxy's own, to write it as the server does."""
        if self._error is not None:
            return
        if message["type"] == "http.response.start":
            self.began = True
            types = (value for name, value in message["headers"] if name.lower() == CONTENT_TYPE)
            content_type = next(types, b"")
            if message["status"] >= 400 and content_type.startswith(b"text/plain"):  # never ours
                self._error = _proxy_error(message["status"])
                return
            self._is_stream = content_type.startswith(b"text/event-stream")
            message = {**message, "headers": _one_request_id(message["headers"])}
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def finish(self) -> None:
        """Send the error where there is no answer, or no more of it."""
        if not self.began or self._error is not None:
            await self._send_error(self._error or _replica_lost("this request"))
        elif self._is_stream and not self._ended:
            last = event(_replica_lost("the rest of this reply").body()) + DONE
            await self._send({"type": "http.response.body", "body": last.encode()})

    async def _send_error(self, error: ApiError) -> None:
        headers = [
            (CONTENT_TYPE, b"application/json"),
            *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
        ]
        body = json.dumps(error.body()).encode()
        await self._send(
            {"type": "http.response.start", "status": error.status, "headers": headers}
        )
        await self._send({"type": "http.response.body", "body": body})


def _one_request_id(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Keep the replica's id of a request, which its log has, and drop the proxy's."""
    ids = [header for header in headers if header[0].lower() == REQUEST_ID]
    return [header for header in headers if header[0].lower() != REQUEST_ID] + ids[:1]


def _replica_lost(part: str) -> ApiError:
    return ApiError(
        503,
        f"the replica that had {part} has ended; ask again in a moment",
        kind="server_error",
        code="replica_lost",
        headers=RETRY_AFTER,
    )


def _proxy_error(status: int) -> ApiError:
    """Return what a status of Ray Serve's own proxy means."""
    match status:
        case 429:
            return ApiError(
                429,
                "too many requests are waiting already; try again in a moment",
                kind="rate_limit_error",
                code="queue_full",
                headers=RETRY_AFTER,
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
                headers=RETRY_AFTER,
            )
