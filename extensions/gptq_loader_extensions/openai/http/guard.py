"""Check requests: the key, the Host and Origin, and the size of the body."""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import socket
from base64 import b64decode
from typing import TYPE_CHECKING

from gptq_loader_extensions.openai.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gptq_loader_extensions.openai.settings import Settings

__all__ = ["Guard"]

# Has a browser ask its user for a name, which may be any, and a password, which is the key.
BASIC_CHALLENGE = 'Basic realm="gptq-loader: any name, and the API key as the password"'
MAX_DIGITS = 15  # of a length in bytes
# Names, IPv4 and, in brackets, IPv6; then nothing but a port. A zone (%eth0) is no part of it.
HOST = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[^][:@/?#%\s]+))(?::(?P<port>[0-9]+))?"
)
PORTS = range(2**16)
# What containers call the machine they run on: names of private use, which no page on the web can
# be served under. A browser takes *.localhost for this machine without asking anyone.
CONTAINER_NAMES = frozenset(
    {
        "gateway.docker.internal",
        "host.containers.internal",
        "host.docker.internal",
        "host.lima.internal",
        "host.minikube.internal",
        "host.orb.internal",
    }
)


class Guard:
    """Refuse requests before anything reads them.

    A page on the web can have a browser send requests here, and with a name that it makes point
    here (DNS rebinding) it could read the answers. So a request must be addressed to this machine
    by a number or by a name of its own, and come from no other origin.

    Args:
        app: the application.
        settings: who may use it.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self._settings = settings
        self._max_body = settings.max_body
        here = socket.gethostname().casefold()
        self._names = frozenset(
            {"localhost", here, f"{here}.local", settings.host.casefold()}
            | CONTAINER_NAMES
            | {name.casefold() for name in settings.allowed_hosts}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            self._check(_headers(scope), hosts=_count(scope, b"host"))
        except ApiError as error:
            await _refuse(error, scope, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _check(self, headers: dict[str, str], *, hosts: int) -> None:
        host_header = headers.get("host", "")
        if hosts > 1 or not self._is_own(host_header):
            raise ApiError(
                403,
                "this server does not go by that name; address it by its number, or start it with "
                "--allow-host NAME",
                code="wrong_host",
            )
        origin = headers.get("origin")
        own = {f"http://{host_header}", f"https://{host_header}"}
        if origin is not None and origin not in own and not self._settings.allows(origin):
            raise ApiError(
                403,
                "pages of that origin may not call this server; start it with --cors ORIGIN to let "
                "them",
                code="wrong_origin",
            )
        if self._key is not None and not self._has_key(headers):
            browser = "text/html" in headers.get("accept", "")
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": BASIC_CHALLENGE if browser else "Bearer"},
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > MAX_DIGITS or int(length) > self._max_body:
            raise self._too_large()

    def _is_own(self, host_header: str) -> bool:
        """Return whether a Host header names this machine, by a number or by a name of its own."""
        match = HOST.fullmatch(host_header)
        if match is None or int((match["port"] or "0")[:MAX_DIGITS]) not in PORTS:
            return False
        if match["ipv6"] is not None:
            return _is_number(match["ipv6"], version=6)
        name = match["name"].casefold().removesuffix(".")  # of a name that is written in full
        is_here = name in self._names or name.endswith(".localhost")
        return is_here or _is_number(name, version=4)

    def _has_key(self, headers: dict[str, str]) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        match scheme.casefold():
            case "bearer":
                key = key.strip()
            case "basic":
                key = _password(key)
            case _:
                key = headers.get("x-api-key", "")
        return hmac.compare_digest(key.encode("latin-1"), self._key or b"")

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"a request may have {self._max_body:,} bytes here; send less, or start the server "
            "with a larger --max-body",
            code="request_too_large",
        )

    def _counted(self, receive: Receive) -> Receive:
        """Count a body that comes in chunks, without a Content-Length."""
        total = 0

        async def receive_counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._max_body:
                raise self._too_large()
            return message

        return receive_counted


def _password(basic: str) -> str:
    """Return the password in what a browser sends, or "" where it cannot be decoded."""
    try:
        return b64decode(basic, validate=True).decode("latin-1").partition(":")[2]
    except ValueError:
        return ""


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _count(scope: Scope, name: bytes) -> int:
    """Count the headers of a name, of which a request may have several."""
    return sum(header[0] == name for header in scope["headers"])


def _is_number(host: str, *, version: int) -> bool:
    try:
        return ipaddress.ip_address(host).version == version
    except ValueError:
        return False


async def _refuse(error: ApiError, scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps(error.body(scope["path"])).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
