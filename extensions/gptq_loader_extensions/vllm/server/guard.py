"""Guard vLLM's server like this package's own: the key is needed on every path.

vLLM's own `--api-key` leaves open some paths that generate, `/invocations` among them.
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

__all__ = ["VARIABLE", "ServerGuard", "guard_environment"]

VARIABLE = "GPTQ_LOADER_VLLM_GUARD"  # passes the settings to vLLM's process, with the key
STOPS = "stops"
FIELDS = ("host", "api_key", "no_auth", "allowed_hosts", "cors", "max_body")


class ServerGuard:
    """Refuse requests before vLLM reads them; the middleware of vLLM's `--middleware`.

    Args:
        app: vLLM's application.
        environ: the environment, which has the settings.
    """

    def __init__(self, app: ASGIApp, environ: Mapping[str, str] = os.environ) -> None:
        from gptq_loader_extensions.openai.http.cors import Cors

        fields: dict[str, Any] = json.loads(environ[VARIABLE])
        stops = fields.pop(STOPS)
        lists = {name: tuple(fields[name]) for name in ("allowed_hosts", "cors")}
        settings = Settings(**{**fields, **lists})
        self._app: ASGIApp = Guard(ChatStops(app, stops), settings)
        if settings.cors:
            self._app = Cors(self._app, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        await self._app(scope, receive, send)


def guard_environment(settings: Settings, stops: Sequence[str]) -> dict[str, str]:
    """Return the environment from which a guard reads these settings and a chat's stops."""
    fields = {name: getattr(settings, name) for name in FIELDS}
    return {VARIABLE: json.dumps({**fields, STOPS: list(stops)})}
