"""Let pages of the origins that may call the server do so."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from starlette.middleware.cors import CORSMiddleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from gptq_loader_extensions.openai.settings import Settings

__all__ = ["Cors"]

# A page of the web that calls this machine; older Starlettes do not know of it.
PRIVATE_NETWORK: dict[str, Any] = (
    {"allow_private_network": True}
    if "allow_private_network" in signature(CORSMiddleware).parameters
    else {}
)
MAX_AGE = 600  # seconds for which a browser keeps what was allowed


class Cors(CORSMiddleware):
    """Starlette's, with what a server of models needs.

    Args:
        app: the application.
        settings: name the origins.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        super().__init__(
            app,
            allow_origin_regex=settings.origin_pattern(),
            allow_methods=["DELETE", "GET", "HEAD", "POST", "PUT"],
            allow_headers=["*"],  # SDKs send many of their own
            **PRIVATE_NETWORK,
            expose_headers=["X-Request-Id", "X-Ignored-Options"],
            max_age=MAX_AGE,
        )
