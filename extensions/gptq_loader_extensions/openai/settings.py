"""The settings of a server: where it listens, who may use it, and its limits."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Settings", "is_loopback"]

# Of web pages, exactly; of applications and extensions, whose names may be drawn at each start,
# also all of a kind: vscode-webview://*.
ORIGIN = re.compile(
    r"https?://[^\s/*]+|(?!https?:)[A-Za-z][A-Za-z0-9+.-]*://(?:[^\s/*]*|\*)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to serve.

    Attributes:
        host: the address to listen on.
        port: the port; 0 takes any that is free.
        api_key: what every request must send; None requires none.
        no_auth: whether others on the network may use a server without a key.
        allowed_hosts: names, besides this machine's own, that requests may be addressed to.
        cors: the origins whose pages may call the API from a browser; of applications and
            extensions also all of a kind, as vscode-webview://*.
        models_dir: the folder whose models may be loaded by name; None takes the usual ones.
        cached_models: whether models of the Hugging Face cache may be loaded by name.
        downloads: whether a name may make the server download a model.
        pickles: whether a name may make the server read .bin and .pt files.
        max_queue: how many requests may wait; the next one is refused.
        max_num_seqs: how many replies are generated at a time.
        timeout: the seconds a request may take, its time in the queue included.
        max_body: the largest body of a request, in bytes.
        max_new_tokens: the limit of a reply; None leaves it to the context.
        grace: the seconds that running replies get to end when the server stops.
        as_json: whether to write to stdout, as JSON, where the server listens.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    no_auth: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    models_dir: Path | None = None
    cached_models: bool = False
    downloads: bool = False
    pickles: bool = False
    max_queue: int = 64
    max_num_seqs: int = 16
    timeout: float = 600.0
    max_body: int = 4 * 2**20
    max_new_tokens: int | None = None
    grace: int = 5
    as_json: bool = False

    def check(self) -> None:
        """Refuse settings that are impossible, or that would let anyone on the network in.

        Raises:
            OptionInvalid: one of them is.
        """
        if not 0 <= self.port < 2**16:
            raise OptionInvalid(
                f"{self.port} is not a port; ports are 1 to 65535",
                hint="choose another with --port",
            )
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise OptionInvalid(
                "an API key must be ASCII characters, and not empty",
                hint="choose another with --api-key or GPTQ_LOADER_API_KEY",
            )
        if not is_loopback(self.host) and self.api_key is None and not self.no_auth:
            raise OptionInvalid(
                f"everyone who can reach {self.host} could use this server",
                hint="set a key with --api-key or GPTQ_LOADER_API_KEY; or add --no-auth if the "
                "network itself keeps others out",
            )
        for name, value, minimum in (
            ("--max-queue", self.max_queue, 1),
            ("--timeout", self.timeout, 1),
            ("--max-body", self.max_body, 1024),
            ("--max-new-tokens", self.max_new_tokens or 1, 1),
        ):
            if value < minimum:
                raise OptionInvalid(f"{name} is {value}", hint=f"choose at least {minimum}")
        for origin in self.cors:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise OptionInvalid(
                    f"{origin!r} is not an origin",
                    hint="write it as http://localhost:3000, app://obsidian.md or "
                    "chrome-extension://*, or as * for all",
                )

    def allows(self, origin: str) -> bool:
        """Return whether pages of an origin may call the API."""
        return any(
            allowed in ("*", origin) or (allowed.endswith("*") and origin.startswith(allowed[:-1]))
            for allowed in self.cors
        )

    def origin_pattern(self) -> str:
        """Return a regular expression of the origins whose pages may call the API."""
        patterns = []
        for allowed in self.cors:
            is_family = allowed.endswith("*")
            patterns.append(re.escape(allowed.removesuffix("*")) + (".*" if is_family else ""))
        return "|".join(patterns)


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    if host.casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
