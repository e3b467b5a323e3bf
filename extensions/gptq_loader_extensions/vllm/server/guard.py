"""Let requests into vLLM's server as into this package's own: the key is needed on every path.

vLLM's own `--api-key` leaves some paths open that answer with the model, `/invocations` among them.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.http.guard import Guard
from gptq_loader_extensions.openai.settings import Settings
from gptq_loader_extensions.vllm.server.stops import ChatStops

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["VARIABLE", "ServerGuard", "as_environment"]

VARIABLE = "GPTQ_LOADER_VLLM_GUARD"  # how the settings reach vLLM's process; they hold the key
STOPS = "stops"
FIELDS = ("host", "api_key", "no_auth", "allowed_hosts", "cors", "max_body")
MAX_AGE = 600  # seconds for which a browser keeps what CORS allowed


class ServerGuard:
    """Refuse requests before vLLM reads them; vLLM's `--middleware` names this.

    Args:
        app: vLLM's application.
        environ: where the settings are.
    """

    def __init__(self, app: ASGIApp, environ: Mapping[str, str] = os.environ) -> None:
        from starlette.middleware.cors import CORSMiddleware

        given: dict[str, Any] = json.loads(environ[VARIABLE])
        stops = given.pop(STOPS)
        lists = {it: tuple(given[it]) for it in ("allowed_hosts", "cors")}
        settings = Settings(**{**given, **lists})
        self._app: ASGIApp = Guard(ChatStops(app, stops), settings)
        if settings.cors:
            self._app = CORSMiddleware(
                self._app,
                allow_origins=list(settings.cors),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Api-Key"],
                max_age=MAX_AGE,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        await self._app(scope, receive, send)


def as_environment(settings: Settings, stops: Sequence[str]) -> dict[str, str]:
    """Give the environment that a guard of these settings, and of these stops of chats, reads."""
    fields = {name: getattr(settings, name) for name in FIELDS}
    return {VARIABLE: json.dumps({**fields, STOPS: list(stops)})}
