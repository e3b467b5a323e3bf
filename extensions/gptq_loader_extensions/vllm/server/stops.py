"""Add the texts that end a reply to requests for a chat: vLLM's server has no place for them.

A model card's prompt ends a turn with words, such as `### Instruction:`, and not with a token.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["ChatStops", "with_stops"]

CHAT = "/v1/chat/completions"


class ChatStops:
    """Add stops to what clients ask of a chat.

    Args:
        app: what answers.
        stops: the texts that end a reply.
    """

    def __init__(self, app: ASGIApp, stops: Sequence[str]) -> None:
        self._app = app
        self._stops = stops

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, a chat's with the stops in it."""
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
        asked = with_stops(body, self._stops)
        headers = [it for it in scope["headers"] if it[0] != b"content-length"]
        headers.append((b"content-length", str(len(asked)).encode()))
        waiting = [{"type": "http.request", "body": asked, "more_body": False}]

        async def receive_asked() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app({**scope, "headers": headers}, receive_asked, send)


def with_stops(body: bytes, stops: Sequence[str]) -> bytes:
    """Add stops to a request's own; what is no request stays as it is, for the server to refuse."""
    try:
        asked: Any = json.loads(body)
    except ValueError:
        return body
    if not isinstance(asked, dict):
        return body
    own = asked.get("stop") or []
    own = [own] if isinstance(own, str) else own
    if not isinstance(own, list):
        return body
    return json.dumps({**asked, "stop": [*own, *(it for it in stops if it not in own)]}).encode()
