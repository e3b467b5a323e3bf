"""Build the application of all routes, with a page mounted beside them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from gptq_loader_extensions.openai.errors import KOBOLD, ApiError, to_api_error
from gptq_loader_extensions.openai.http.guard import Guard
from gptq_loader_extensions.openai.http.request_log import CLIENT_CLOSED_REQUEST, RequestLog
from gptq_loader_extensions.openai.replies.reply_events import ClientDisconnected
from gptq_loader_extensions.openai.routes.chat import chat_routes
from gptq_loader_extensions.openai.routes.completions import completion_routes
from gptq_loader_extensions.openai.routes.info import info_routes
from gptq_loader_extensions.openai.routes.json_route import field_error
from gptq_loader_extensions.openai.routes.kobold import kobold_routes
from gptq_loader_extensions.openai.routes.webui import webui_routes

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send

    from gptq_loader_extensions.openai.server import Server

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

MAX_AGE = 600  # seconds for which a browser keeps what CORS allowed


def create_app(server: Server, *, page: Callable[[FastAPI], object] | None = None) -> FastAPI:
    """Build the application: the API, and a page if there is one.

    Args:
        server: what the routes share.
        page: adds its own routes, "/" among them, to the application; without it "/" describes
            the server.
    """
    app = FastAPI(
        title="gptq-loader",
        description="OpenAI's API, and the routes of Kobold and text-generation-webui clients.",
        docs_url=None,  # their pages fetch scripts from elsewhere
        redoc_url=None,
    )
    for routes in (info_routes, chat_routes, completion_routes, webui_routes, kobold_routes):
        app.include_router(routes(server))
    if page is None:
        app.add_api_route("/", _index(server), methods=["GET"], include_in_schema=False)
    else:
        app.router.routes.append(_UnknownApiPath(list(app.router.routes)))
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
    app.add_middleware(RequestLog, metrics=server.metrics)
    return app


class _UnknownApiPath(BaseRoute):
    """Match the API's paths that no route has, before the page does, which answers in HTML.

    Args:
        routes: the API's.
    """

    def __init__(self, routes: list[BaseRoute]) -> None:
        self._routes = routes

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match every path of the API's."""
        is_api = scope["type"] == "http" and scope["path"].startswith(("/v1/", KOBOLD))
        return (Match.FULL if is_api else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse: there is no such path, or not by this method."""
        del receive, send
        other_method = any(route.matches(scope)[0] is Match.PARTIAL for route in self._routes)
        raise HTTPException(405 if other_method else 404)


def _index(server: Server) -> Callable[[], dict[str, Any]]:
    def index() -> dict[str, Any]:
        """Describe the server."""
        loaded = server.registry.loaded
        return {
            "name": "gptq-loader",
            "model": None if loaded is None else loaded[0],
            "kernels": {} if loaded is None else loaded[1].plan.kernels(),
            "openai": "/v1",
            "schema": "/openapi.json",
        }

    return index


def _handle_errors(app: FastAPI) -> None:
    """Answer every error in the shape that the path's clients read (`ApiError.body`)."""

    async def api_error(request: Request, error: Exception) -> Response:
        answer = to_api_error(error)
        if answer.status == 500 and answer is not error:
            logger.error("a request failed", exc_info=error)
        return JSONResponse(answer.body(request.url.path), answer.status, headers=answer.headers)

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await api_error(request, field_error(error.errors()[0]))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # raised while the body was read
            return await api_error(request, error.__cause__)
        answer = ApiError(error.status_code, str(error.detail), headers=error.headers)
        return await api_error(request, answer)

    async def disconnected(request: Request, error: Exception) -> Response:
        del request, error
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnected, disconnected)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(Exception, api_error)
