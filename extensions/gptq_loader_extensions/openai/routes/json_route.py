"""Read the bodies of requests on another thread than the one that sends everybody's replies."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from gptq_loader_extensions.openai.errors import ApiError, invalid
from gptq_loader_extensions.openai.schema.json_text import parse_body

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from starlette.types import Receive, Scope

__all__ = ["JsonRoute", "field_error"]

SMALL_BODY = 1 << 16  # bytes, which are read at once


class JsonRoute(APIRoute):
    """A route whose body is parsed and validated before FastAPI sees it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what handles a request."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler
        body: Any = self.body_field.field_info.annotation
        adapter: TypeAdapter[Any] = TypeAdapter(body)

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive, adapter))

        return handle


class JsonRequest(Request):
    """A request whose JSON is what its route takes, which FastAPI then passes on as it is.

    Args:
        scope: the connection's.
        receive: reads the body.
        adapter: validates the JSON.
    """

    def __init__(self, scope: Scope, receive: Receive, adapter: TypeAdapter[Any]) -> None:
        super().__init__(scope, receive)
        self._adapter = adapter

    async def json(self) -> Any:  # noqa: ANN401 - what the route takes
        """Return the body as the route takes it.

        Raises:
            ApiError: it is no JSON, or not what the route takes.
        """
        body = await self.body()
        if len(body) <= SMALL_BODY:
            return self._parse(body)
        return await asyncio.to_thread(self._parse, body)

    def _parse(self, body: bytes) -> Any:  # noqa: ANN401
        try:
            content = parse_body(body)
        except ValueError as error:
            raise invalid(str(error)) from error
        try:
            return self._adapter.validate_python(content)
        except ValidationError as error:
            raise field_error(error.errors(include_url=False)[0]) from error


def field_error(first: Mapping[str, Any]) -> ApiError:
    """Name the first field that is wrong, and what is wrong with it.

    Args:
        first: the first of pydantic's errors.
    """
    fields = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(fields)[:200] or None
    return invalid(f"{param or 'the body'}: {first['msg']}", param=param)
