"""Take the addresses that clients make of a base address which somebody typed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["ApiPaths"]

SLASHES = re.compile(r"//+")
TWICE = re.compile(r"\A(?:/v1)+(?=/v1/)")
# What a client requests whose base address lacks /v1.
WITHOUT_V1 = ("/chat/completions", "/completions", "/embeddings", "/messages", "/responses")


class ApiPaths:
    """Give a request the path of the route that it means.

    A base address with a slash at its end, with /v1 twice, or without it.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request."""
        if scope["type"] == "http":
            path = _normal(scope["path"])
            if path != scope["path"]:  # in the scope itself, which the log reads
                scope["path"], scope["raw_path"] = path, path.encode()
        await self._app(scope, receive, send)


def _normal(path: str) -> str:
    normal = SLASHES.sub("/", path)
    if normal.startswith(("/v1", "/api/", *WITHOUT_V1)) or normal.rstrip("/") == "/models":
        normal = TWICE.sub("", normal).rstrip("/")
    if normal.startswith(WITHOUT_V1) or normal == "/models":
        normal = f"/v1{normal}"
    return normal
