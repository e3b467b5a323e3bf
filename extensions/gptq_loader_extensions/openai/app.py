"""Put the routes together; a page is mounted beside them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from gptq_loader_extensions.openai.errors import ApiError, invalid, to_api_error
from gptq_loader_extensions.openai.http.guard import Guard
from gptq_loader_extensions.openai.http.request_log import ANSWERED_BY_NOBODY, Traffic
from gptq_loader_extensions.openai.replies.reply_events import ClientDisconnected
from gptq_loader_extensions.openai.routes.chat import chat_routes
from gptq_loader_extensions.openai.routes.completions import completion_routes
from gptq_loader_extensions.openai.routes.info import about_routes
from gptq_loader_extensions.openai.routes.kobold import kobold_routes
from gptq_loader_extensions.openai.routes.webui import internal_routes

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send

    from gptq_loader_extensions.openai.server import Server

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

MAX_AGE = 600  # seconds for which a browser keeps what CORS allowed


def create_app(server: Server, *, page: Callable[[FastAPI], object] | None = None) -> FastAPI:
    """Make the application: the API, and a page where one is given.

    Args:
        server: what the routes share.
        page: puts its own routes, "/" among them, into the application; without it "/" says what
            is here.
    """
    app = FastAPI(
        title="gptq-loader",
        description="OpenAI's API, and the routes of Kobold and text-generation-webui clients.",
        docs_url=None,  # their pages fetch scripts from elsewhere
        redoc_url=None,
    )
    for routes in (about_routes, chat_routes, completion_routes, internal_routes, kobold_routes):
        app.include_router(routes(server))
    if page is None:
        app.add_api_route("/", _front(server), methods=["GET"], include_in_schema=False)
    else:
        app.router.routes.append(_Nowhere(list(app.router.routes)))
        page(app)
    _handle_errors(app)
    app.add_middleware(Guard, settings=server.settings)
    if server.settings.cors:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors),
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key"],
            expose_headers=["X-Request-Id", "X-Ignored-Options"],
            max_age=MAX_AGE,
        )
    app.add_middleware(Traffic, metrics=server.metrics)
    return app


class _Nowhere(BaseRoute):
    """Take the API's paths that no route has: the page behind it has no words for programs.

    Args:
        routes: those that the API has.
    """

    def __init__(self, routes: list[BaseRoute]) -> None:
        self._routes = routes

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Say whether a path is below the API's."""
        ours = scope["type"] == "http" and scope["path"].startswith(("/v1/", "/api/"))
        return (Match.FULL if ours else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse: no such path, or not by this method."""
        del receive, send
        there = any(it.matches(scope)[0] is Match.PARTIAL for it in self._routes)
        raise HTTPException(405 if there else 404)


def _front(server: Server) -> Callable[[], dict[str, Any]]:
    def front() -> dict[str, Any]:
        """Say what is here."""
        loaded = server.registry.loaded
        return {
            "name": "gptq-loader",
            "model": None if loaded is None else loaded[0],
            "kernels": {} if loaded is None else loaded[1].plan.kernels(),
            "openai": "/v1",
            "schema": "/openapi.json",
        }

    return front


def _handle_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    async def api_error(request: Request, error: Exception) -> Response:
        told = to_api_error(error)
        if told.status == 500 and told is not error:
            logger.error("a request failed", exc_info=error)
        body = told.body()
        if request.url.path.startswith("/api/"):  # where Kobold's clients look for it
            body["detail"] = {"msg": told.message, "type": told.kind}
        return JSONResponse(body, told.status, headers=told.headers)

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await api_error(request, _in_words(error))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # raised while the body was read
            return await api_error(request, error.__cause__)
        told = ApiError(error.status_code, str(error.detail), headers=error.headers)
        return await api_error(request, told)

    async def gone(request: Request, error: Exception) -> Response:
        del request, error
        return Response(status_code=ANSWERED_BY_NOBODY)

    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnected, gone)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(Exception, api_error)


def _in_words(error: RequestValidationError) -> ApiError:
    """Name the first field that is wrong, and how."""
    first = error.errors()[0]
    where = [str(it) for it in first["loc"] if it != "body"]
    if first["type"] == "json_invalid":
        return invalid("the body is not JSON")
    param = ".".join(where)[:200] or None
    return invalid(f"{param or 'the body'}: {first['msg']}", param=param)
