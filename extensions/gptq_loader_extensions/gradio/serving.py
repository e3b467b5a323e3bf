"""Serve a page on this machine: find a port, say where, wait for Ctrl-C."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
import webbrowser
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import OptionInvalid, PluginError

if TYPE_CHECKING:
    import gradio
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gptq_loader_plugin.loaded import LoadedModel

__all__ = ["open_page", "serve"]

# What a page may fetch: itself, and nothing else. Without this a picture in a reply, which is
# Markdown, would have the browser ask whatever address the model writes.
CONTENT_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"

logger = logging.getLogger(__name__)


def serve(model: LoadedModel, *, host: str, port: int | None, open_browser: bool) -> None:
    """Open the page, say its address on stderr, and serve it until Ctrl-C.

    Raises:
        PluginError: gradio is not installed, or cannot serve.
        OptionInvalid: the page cannot be served on that address and port.
    """
    page, url = open_page(model, host=host, port=port)
    try:
        sys.stderr.write(f"Open {url}\nCtrl-C ends it.\n")
        sys.stderr.flush()
        if open_browser and _has_display():
            _show(url)
        while True:
            time.sleep(3600)  # and not an Event's wait, which Ctrl-C does not end on Windows
    finally:
        page.close(verbose=False)


def open_page(
    model: LoadedModel, *, host: str = "127.0.0.1", port: int | None = None
) -> tuple[gradio.Blocks, str]:
    """Serve the page from a thread of its own; give it and its address.

    Raises:
        PluginError: gradio is not installed, or cannot serve.
        OptionInvalid: the page cannot be served on that address and port.
    """
    free = _bound_port(host, port)
    try:
        import gradio  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise PluginError(
            f"the chat page needs gradio, which cannot be imported: {error}",
            hint="pip install 'gptq-loader-plugin[gradio]'",
        ) from error
    from starlette.middleware import Middleware

    from gptq_loader_extensions.gradio.page import build_page, launch_style
    from gptq_loader_extensions.gradio.versions import known

    page = build_page(model)
    options = known(
        type(page).launch,
        server_name=host,
        server_port=port if port is None else free,
        prevent_thread_lock=True,
        quiet=True,
        inbrowser=False,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        show_api=False,
        app_kwargs={"middleware": [Middleware(PageOnly)]},
        **launch_style(),
    )
    try:
        page.queue(max_size=64).launch(**options)
    except OSError as error:
        raise OptionInvalid(
            f"the page cannot be served on {host}: {error}",
            hint="choose a free port with --port",
        ) from error
    shown = "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104 - compared, not bound
    return page, f"http://{f'[{shown}]' if ':' in shown else shown}:{page.server_port}"


class PageOnly:
    """Tell browsers, with every answer, to fetch nothing but this page's own files.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and add the policy to its answer."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", CONTENT_POLICY)
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _bound_port(host: str, port: int | None) -> int:
    """Bind the address once, to say in words why it cannot be served; give the port it got.

    Raises:
        OptionInvalid: the port is taken or not allowed, or the host is not this machine's.
    """
    if port is not None and not 0 <= port < 2**16:
        raise OptionInvalid(
            f"{port} is no port: ports are 1 to 65535", hint="choose another with --port"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port or 0, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            return int(trial.getsockname()[1])
    except OSError as error:
        message, hint = _in_words(host, port, error)
        raise OptionInvalid(message, hint=hint) from error


def _in_words(host: str, port: int | None, error: OSError) -> tuple[str, str]:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken", (
            "choose another with --port, or leave it out to take the first free one from 7860"
        )
    if error.errno == errno.EACCES:
        return f"port {port} may not be used: {error.strerror}", "choose one above 1023"
    return f"{host} is not an address of this machine: {error.strerror or error}", (
        "serve on 127.0.0.1 for this machine alone, or 0.0.0.0 for its whole network"
    )


def _has_display() -> bool:
    """Whether a browser window can open; without one, webbrowser may start a text browser."""
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _show(url: str) -> None:
    """Open the page in a browser; where there is none, the address on stderr must do."""
    try:
        webbrowser.open(url)
    except (webbrowser.Error, OSError) as error:
        logger.info("no browser could be opened: %s", error)
