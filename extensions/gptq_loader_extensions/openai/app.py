"""Build the application of all routes, with a page mounted beside them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from gptq_loader_extensions.openai.errors import (
    API_PATHS,
    ApiError,
    to_api_error,
    unknown_route,
)
from gptq_loader_extensions.openai.http.api_paths import ApiPaths
from gptq_loader_extensions.openai.http.cors import Cors
from gptq_loader_extensions.openai.http.guard import Guard
from gptq_loader_extensions.openai.http.request_log import CLIENT_CLOSED_REQUEST, RequestLog
from gptq_loader_extensions.openai.replies.reply_events import ClientDisconnected
from gptq_loader_extensions.openai.routes.anthropic import anthropic_routes
from gptq_loader_extensions.openai.routes.chat import chat_routes
from gptq_loader_extensions.openai.routes.completions import completion_routes
from gptq_loader_extensions.openai.routes.info import info_routes
from gptq_loader_extensions.openai.routes.json_route import field_error
from gptq_loader_extensions.openai.routes.kobold import kobold_routes
from gptq_loader_extensions.openai.routes.ollama import ollama_routes
from gptq_loader_extensions.openai.routes.ollama_models import ollama_model_routes
from gptq_loader_extensions.openai.routes.responses import responses_routes
from gptq_loader_extensions.openai.routes.tokens import token_routes
from gptq_loader_extensions.openai.routes.webui import webui_routes

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send

    from gptq_loader_extensions.openai.server import Server

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

ROUTES = (
    info_routes,
    chat_routes,
    completion_routes,
    responses_routes,
    anthropic_routes,
    ollama_routes,
    ollama_model_routes,
    token_routes,
    webui_routes,
    kobold_routes,
)
PAGE_PATHS = ("/gradio_api/", "/login", "/logout")  # that a page sends more than GET to
# Of llama.cpp, vLLM, SGLang and what watches servers: what no page has, and clients look for.
OTHERS_PATHS = frozenset(
    {
        *("/api", "/get_model_info", "/get_server_info", "/healthz", "/livez", "/load"),
        *("/lora-adapters", "/ping", "/props", "/readyz", "/server_info", "/slots", "/v1"),
        "/version",
    }
)


def create_app(server: Server, *, page: Callable[[FastAPI], object] | None = None) -> FastAPI:
    """Build the application: the API, and a page if there is one.

    Args:
        server: what the routes share.
        page: adds its own routes, "/" among them, to the application; without it "/" describes
            the server.
    """
    app = FastAPI(
        title="gptq-loader",
        description="The APIs of OpenAI, Anthropic and Ollama, Kobold and text-generation-webui.",
        docs_url=None,  # their pages fetch scripts from elsewhere
        redoc_url=None,
    )
    for routes in ROUTES:
        app.include_router(routes(server))
    if page is None:
        app.add_api_route("/", _index(server), methods=["GET"], include_in_schema=False)
    else:
        app.router.routes.append(_UnknownApiPath())
        page(app)
    _handle_errors(app)
    app.add_middleware(Guard, settings=server.settings)
    if server.settings.cors:
        app.add_middleware(Cors, settings=server.settings)
    app.add_middleware(ApiPaths)
    app.add_middleware(RequestLog, metrics=server.metrics)
    return app


class _UnknownApiPath(BaseRoute):
    """Match the API's paths that no route has, before the page does, which answers in HTML."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match every path of the APIs', and requests that no page sends."""
        if scope["type"] != "http":
            return Match.NONE, {}
        path = scope["path"]
        is_api = (
            path.startswith(API_PATHS)
            or path in OTHERS_PATHS
            or (scope["method"] not in ("GET", "HEAD") and not path.startswith(PAGE_PATHS))
        )
        return (Match.FULL if is_api else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse: there is no such path."""
        del scope, receive, send
        raise HTTPException(404)


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


def _unknown(app: FastAPI, request: Request) -> ApiError:
    """Refuse a request for which there is no route, or none with its method."""
    scope = {**request.scope, "path": request.url.path}
    other_method = any(route.matches(scope)[0] is Match.PARTIAL for route in app.router.routes)
    return unknown_route(request.method, request.url.path, other_method=other_method)


def _handle_errors(app: FastAPI) -> None:
    """Answer every error in the shape that the path's clients read (`ApiError.body`)."""

    async def api_error(request: Request, error: Exception) -> Response:
        answer = to_api_error(error)
        if answer.status == 500 and answer is not error:
            logger.error("a request failed", exc_info=error)
        return JSONResponse(answer.body(request.url.path), answer.status, headers=answer.headers)

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await api_error(request, field_error(error.errors(), error.body))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # raised while the body was read
            return await api_error(request, error.__cause__)
        if error.status_code in (404, 405):
            return await api_error(request, _unknown(app, request))
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
