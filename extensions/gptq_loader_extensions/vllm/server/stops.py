"""Add the texts that end a reply to chat requests: vLLM's server has no option for them.

A model card's prompt ends a turn with a text, such as `### Instruction:`, and not with a token.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["ChatStops", "add_stops"]

CHAT = "/v1/chat/completions"


class ChatStops:
    """A middleware that adds stop texts to chat requests.

    Args:
        app: the application.
        stops: the texts that end a reply.
    """

    def __init__(self, app: ASGIApp, stops: Sequence[str]) -> None:
        self._app = app
        self._stops = stops

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, a chat's with the stops added."""
        if not self._stops or scope["type"] != "http" or scope["path"] != CHAT:
            await self._app(scope, receive, send)
            return
        body, message = b"", await receive()
        while message["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
            message = await receive()
        if message["type"] != "http.request":  # the client has gone
            return
        body = add_stops(body, self._stops)
        headers = [header for header in scope["headers"] if header[0] != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_changed() -> Message:
            return messages.pop() if messages else await receive()

        await self._app({**scope, "headers": headers}, receive_changed, send)


def add_stops(body: bytes, stops: Sequence[str]) -> bytes:
    """Add stops to a request's own; leave an invalid request as it is, for the server to refuse."""
    try:
        request: Any = json.loads(body)
    except ValueError:
        return body
    if not isinstance(request, dict):
        return body
    own = request.get("stop") or []
    own = [own] if isinstance(own, str) else own
    if not isinstance(own, list):
        return body
    added = [stop for stop in stops if stop not in own]
    return json.dumps({**request, "stop": [*own, *added]}).encode()
