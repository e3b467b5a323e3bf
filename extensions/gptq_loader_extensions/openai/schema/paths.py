"""The paths of the routes that write replies, for these routes and for a proxy before the server.

A reply changes nothing on the server, so that a request to one of them may be sent again.
"""

from __future__ import annotations

__all__ = [
    "ANTHROPIC",
    "CHAT",
    "COMPLETIONS",
    "GENERATE",
    "GENERATE_LATEST",
    "GENERATE_STREAM",
    "OLLAMA_CHAT",
    "OLLAMA_GENERATE",
    "REPLY_PATHS",
    "RESPONSES",
]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATE = "/api/v1/generate"
GENERATE_LATEST = "/api/latest/generate"
GENERATE_STREAM = "/api/extra/generate/stream"
RESPONSES = "/v1/responses"
ANTHROPIC = "/v1/messages"
OLLAMA_CHAT = "/api/chat"
OLLAMA_GENERATE = "/api/generate"
REPLY_PATHS = (
    CHAT,
    COMPLETIONS,
    GENERATE,
    GENERATE_LATEST,
    GENERATE_STREAM,
    RESPONSES,
    ANTHROPIC,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
)
