"""Read the bodies of requests on another thread than the one that sends everybody's replies."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers

from gptq_loader_extensions.openai.errors import ApiError, invalid
from gptq_loader_extensions.openai.schema.aliases import sent_name
from gptq_loader_extensions.openai.schema.json_text import parse_body

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from starlette.types import Receive, Scope

__all__ = ["JsonRoute", "field_error"]

SMALL_BODY = 1 << 16  # bytes, which are read at once
IS_JSON = (b"content-type", b"application/json")
# What pydantic says where a value is of none of a field's types.
OTHER_TYPE = re.compile(r".*_type|.*_parsing|model_attributes_type|is_instance_of")


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

    @property
    def headers(self) -> Headers:
        """The headers, with the body as JSON whatever it is called.

        `curl -d` and the examples of Ollama and llama.cpp say that it is a form, or nothing. A page
        of another origin gains nothing by it: its Origin was checked before.
        """
        others = [it for it in self.scope["headers"] if it[0] != IS_JSON[0]]
        return Headers(raw=[*others, IS_JSON])

    async def json(self) -> Any:  # noqa: ANN401 - what the route takes
        """Return the body as the route takes it.

        Raises:
            ApiError: it is no JSON, or not what the route takes.
        """
        encoding = self.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ApiError(
                415,
                f"a body in the Content-Encoding {encoding[:50]!r} is not read here; send it "
                "uncompressed",
                code="unsupported_encoding",
            )
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
            raise field_error(error.errors(include_url=False), content) from error


def field_error(errors: Sequence[Mapping[str, Any]], content: object = None) -> ApiError:
    """Name a field that is wrong, and what is wrong with it.

    A field may be of several types, and pydantic has an error for each: the one that says more
    than that it is another type is meant, or the one that is furthest in.

    Args:
        errors: pydantic's.
        content: the body.
    """

    def rank(error: Mapping[str, Any]) -> tuple[bool, int]:
        is_other_type = OTHER_TYPE.fullmatch(error["type"]) is not None
        return not is_other_type, len(_fields(error, content))

    first = _fields(errors[0], content)[:1]
    of_first = [error for error in errors if _fields(error, content)[:1] == first]
    chosen = max(of_first, key=rank)
    fields = _fields(chosen, content)
    messages = [chosen["msg"]]
    if not rank(chosen)[0]:
        messages = [error["msg"] for error in of_first if _fields(error, content) == fields]
    if fields:
        fields[0] = sent_name(content, fields[0])
    param = ".".join(fields)[:200] or None
    text = " or ".join(dict.fromkeys(messages))
    return invalid(f"{param or 'the body'}: {text}", param=param)


def _fields(error: Mapping[str, Any], content: object) -> list[str]:
    """Return where a value stands in the body, without the names that pydantic has for types."""
    fields: list[str] = []
    parts = [part for part in error["loc"] if part != "body"]
    for i, part in enumerate(parts):
        is_key = isinstance(content, dict) and part in content
        if is_key or _is_index(part, content):
            content = content[part]  # type: ignore[index]
        elif content is not None:
            is_missing = error["type"] == "missing" and i == len(parts) - 1
            is_alias = i == 0 and sent_name(content, str(part)) != str(part)
            if not (is_missing or is_alias):
                continue
        fields.append(str(part))
    return fields


def _is_index(part: object, content: object) -> bool:
    return isinstance(content, list) and isinstance(part, int) and part < len(content)
