"""The paths of the routes that write replies, for these routes and for a proxy before the server.

A reply changes nothing on the server, so that a request to one of them may be sent again.
"""

from __future__ import annotations

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "GENERATE",
    "GENERATE_LATEST",
    "GENERATE_STREAM",
    "REPLY_PATHS",
    "RESPONSES",
]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATE = "/api/v1/generate"
GENERATE_LATEST = "/api/latest/generate"
GENERATE_STREAM = "/api/extra/generate/stream"
RESPONSES = "/v1/responses"
REPLY_PATHS = (
    CHAT,
    COMPLETIONS,
    GENERATE,
    GENERATE_LATEST,
    GENERATE_STREAM,
    RESPONSES,
)
