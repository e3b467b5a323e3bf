"""Refusals and failures, in the shapes that clients read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import (
    CheckpointError,
    GPTQLoaderError,
    OptionInvalid,
    PromptTooLong,
    TemplateError,
    is_out_of_memory,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "API_PATHS",
    "OLLAMA",
    "ApiError",
    "PromptTooLongError",
    "invalid",
    "no_embeddings",
    "to_api_error",
    "unknown_route",
]

KOBOLD = "/api/"  # begins the paths of Kobold's clients, but for those of Ollama's
OLLAMA = (  # those that there are not here are among them, for the shape of that answer
    "/api/chat",
    "/api/copy",
    "/api/create",
    "/api/delete",
    "/api/embed",
    "/api/embeddings",
    "/api/generate",
    "/api/ps",
    "/api/pull",
    "/api/push",
    "/api/show",
    "/api/tags",
    "/api/version",
)
ANTHROPIC = "/v1/messages"
API_PATHS = ("/v1/", KOBOLD)  # begin all paths of APIs
# Anthropic's names of errors, by status.
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A response that is an error.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do about it.
        kind: OpenAI's `type`.
        code: OpenAI's `code`, for programs.
        param: the field of the request that is wrong.
        headers: more headers of the response.
        details: Anthropic's `details`, for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.details = details

    def body(self, path: str = "") -> dict[str, Any]:
        """Return the content, in the shape that the clients of a path read.

        OpenAI's clients read `error`. Kobold's read `detail`, as KoboldAI's server writes it: their
        paths have both. Ollama's read a text, Anthropic's a type besides.
        """
        if path.startswith(ANTHROPIC):
            kind = "invalid_request_error" if self.status < 500 else "api_error"
            kind = ANTHROPIC_KINDS.get(self.status, kind)
            error: dict[str, Any] = {"type": kind, "message": self.message}
            if self.details is not None:
                error["details"] = dict(self.details)
            return {"type": "error", "error": error}
        if path in OLLAMA:
            return {"error": self.message}
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        if not path.startswith(KOBOLD):
            return {"error": error}
        return {"error": error, "detail": {"msg": self.message, "type": self.kind}}


class PromptTooLongError(ApiError):
    """The refusal of a prompt that is too long, in the words that each API's clients look for.

    Agents leave out older turns, or sum them up, where they find these and their numbers.
    """

    def __init__(self, error: PromptTooLong) -> None:
        more = "" if error.exact else " or more"
        super().__init__(
            400,
            f"This model's maximum context length is {error.context} tokens. However, your "
            f"messages resulted in {error.tokens} tokens{more}. Please reduce the length of the "
            "messages, or leave the oldest ones out.",
            code="context_length_exceeded",
            param="messages",
        )
        self._anthropics = (
            f"prompt is too long: {error.tokens} tokens > {error.context} maximum; shorten it, or "
            "leave the oldest turns out"
        )

    def body(self, path: str = "") -> dict[str, Any]:
        """Return the content, in the words of the path's API."""
        body = super().body(path)
        if path.startswith(ANTHROPIC):
            body["error"]["message"] = self._anthropics
        return body


def no_embeddings() -> ApiError:
    """Return the refusal of embeddings: a model that writes text makes no useful ones."""
    return ApiError(
        501,
        "this server makes no embeddings: its models write text; ask a server of an embedding "
        "model",
        code="not_supported",
        headers={"x-should-retry": "false"},  # which OpenAI's own clients obey
    )


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the refusal of a malformed request."""
    return ApiError(400, message, param=param, code=code)


def unknown_route(method: str, path: str, *, other_method: bool) -> ApiError:
    """Return the refusal of a request for which there is no route.

    Args:
        method: the request's.
        path: the request's.
        other_method: whether there is a route for another method.
    """
    what = f"{method} {path[:200]}"
    if other_method:
        return ApiError(
            405,
            f"there is no route {what} here; it takes another method, see GET /openapi.json",
            code="method_not_allowed",
        )
    return ApiError(
        404,
        f"there is no route {what} here; GET /openapi.json lists those there are, and clients of "
        "OpenAI's API take the server's address with /v1 behind it",
        code="unknown_route",
    )


def to_api_error(error: Exception) -> ApiError:
    """Turn what handling a request raised into a response."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        return PromptTooLongError(error)
    if isinstance(error, OptionInvalid | TemplateError):
        return invalid(f"{error.message}; {error.hint}")
    if is_out_of_memory(error):
        return ApiError(
            503,
            "there was not enough memory for this request; send a shorter prompt, ask for fewer "
            "tokens, or serve a smaller model",
            kind="server_error",
            code="out_of_memory",
        )
    if isinstance(error, GPTQLoaderError):
        message = error.message
        if isinstance(error, CheckpointError):
            message = message.replace(str(error.path), error.path.name)
        return ApiError(503, f"{message}; {error.hint}", kind="server_error", code="model_unusable")
    return ApiError(
        500,
        "the server failed on this request; its log says why",
        kind="server_error",
        code="internal_error",
    )
