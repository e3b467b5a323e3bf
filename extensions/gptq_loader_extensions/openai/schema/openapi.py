"""The error responses of every route, in the OpenAPI schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

__all__ = ["ERRORS", "EVENTS", "NOT_IMPLEMENTED", "ErrorBody"]


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error, as OpenAI writes it."""

    error: Error


REFUSALS = {
    400: "malformed, or asks for what this server does not do",
    401: "the key is missing or wrong",
    403: "the Host or Origin is not allowed, or a model's files may not be read",
    404: "there is no such model",
    413: "more bytes than allowed",
    429: "too many requests are waiting",
    503: "not enough memory, or a model that cannot be loaded",
    504: "it took longer than allowed",
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the whole reply, or events", "content": {"text/event-stream": {}}}
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "model": ErrorBody}
    for status, description in REFUSALS.items()
}
NOT_IMPLEMENTED: dict[int | str, dict[str, Any]] = {
    501: {"description": "this server does not do that", "model": ErrorBody}
}
