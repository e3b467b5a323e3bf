"""The error responses of every route, in the OpenAPI schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

__all__ = [
    "ANTHROPIC_ERRORS",
    "ERRORS",
    "EVENTS",
    "NOT_IMPLEMENTED",
    "OLLAMA_ERRORS",
    "ErrorBody",
    "OllamaErrorBody",
]


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error, as OpenAI writes it."""

    error: Error


class AnthropicFault(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """An error, as Anthropic writes it."""

    type: Literal["error"]
    error: AnthropicFault


class OllamaErrorBody(BaseModel):
    """An error, as Ollama writes it."""

    error: str


REFUSALS = {
    400: "malformed, or asks for what this server does not do",
    401: "the key is missing or wrong",
    403: "the Host or Origin is not allowed, or a model's files may not be read",
    404: "there is no such model",
    413: "more bytes than allowed",
    415: "a body that is compressed",
    429: "too many requests are waiting",
    503: "not enough memory, or a model that cannot be loaded",
    504: "it took longer than allowed",
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the whole reply, or events", "content": {"text/event-stream": {}}}
}


def _errors(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": description, "model": body}
        for status, description in REFUSALS.items()
    }


ERRORS = _errors(ErrorBody)
ANTHROPIC_ERRORS = _errors(AnthropicErrorBody)
OLLAMA_ERRORS = _errors(OllamaErrorBody)
NOT_IMPLEMENTED: dict[int | str, dict[str, Any]] = {
    501: {"description": "this server does not do that", "model": ErrorBody}
}
