"""Serve a page on this machine until Ctrl-C, or mount it in another server."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
import webbrowser
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.gradio.jobs.models import Loaded
from gptq_loader_extensions.gradio.page import Parts
from gptq_loader_extensions.gradio.storage.catalog import Catalog
from gptq_loader_plugin.errors import OptionInvalid, PluginError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import gradio
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["mount", "mount_page", "open_page", "parts_for", "serve"]

WAITING = 64  # events of all browsers together that may wait in the queue
UPLOADS = 1  # the largest file in bytes that a browser may send: the page takes none

# What a page may fetch: itself, and nothing else. Without this a picture in a reply, which is
# Markdown, would make the browser fetch whatever address the model writes.
CONTENT_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"

logger = logging.getLogger(__name__)


def serve(
    model: LoadedModel | None,
    *,
    host: str,
    port: int | None,
    open_browser: bool,
    models_dir: Path | None = None,
) -> None:
    """Open the page, print its address to stderr, and serve it until Ctrl-C.

    Raises:
        PluginError: gradio is not installed, or cannot serve.
        OptionInvalid: the page cannot be served on that address and port.
    """
    page, url = open_page(model, host=host, port=port, models_dir=models_dir)
    try:
        sys.stderr.write(f"Open {url}\nPress Ctrl-C to stop.\n")
        sys.stderr.flush()
        if open_browser and _has_display():
            _show(url)
        while True:
            time.sleep(3600)  # and not an Event's wait, which Ctrl-C does not end on Windows
    finally:
        page.close(verbose=False)


def open_page(
    model: LoadedModel | None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    models_dir: Path | None = None,
) -> tuple[gradio.Blocks, str]:
    """Serve the page from a thread of its own; return it and its address.

    Raises:
        PluginError: gradio is not installed, or cannot serve.
        OptionInvalid: the page cannot be served on that address and port.
    """
    free = _bound_port(host, port)
    _check_gradio()
    from gptq_loader_extensions.gradio.page import build_page
    from gptq_loader_extensions.gradio.versions import known

    page = build_page(parts_for(model, models_dir=models_dir))
    options = known(
        type(page).launch,
        server_name=host,
        server_port=port if port is None else free,
        prevent_thread_lock=True,
        quiet=True,
        inbrowser=False,
        share=False,
        show_api=False,
        **_quiet(),
    )
    try:
        page.queue(max_size=WAITING).launch(**options)
    except OSError as error:
        raise OptionInvalid(
            f"the page cannot be served on {host}: {error}",
            hint="choose a free port with --port",
        ) from error
    address = "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104 - compared, not bound
    return page, f"http://{f'[{address}]' if ':' in address else address}:{page.server_port}"


def mount(
    app: FastAPI,
    parts: Parts,
    *,
    path: str = "/",
    allowed: Callable[[str, str], bool] | None = None,
) -> None:
    """Mount the page in an application, behind the routes it already has.

    Args:
        app: the application.
        parts: what the page is built on; its models are those of the application.
        path: where the page is.
        allowed: returns whether a user and a password open the page; None lets everyone in.

    Raises:
        PluginError: gradio is not installed.
    """
    _check_gradio()
    import gradio as gr

    from gptq_loader_extensions.gradio.page import build_page
    from gptq_loader_extensions.gradio.versions import known

    page = build_page(parts).queue(max_size=WAITING)
    options = known(gr.mount_gradio_app, auth=allowed, show_error=False, **_quiet())
    gr.mount_gradio_app(app, page, path=path, **options)


def mount_page(app: FastAPI, server: Server) -> None:
    """Mount the page at "/", behind the API's routes."""
    from gptq_loader_extensions.gradio.jobs.server_models import ServerModels

    settings = server.settings
    catalog = Catalog(models_dir=settings.models_dir, cache=settings.cached_models)
    if (initial := server.registry.initial) is not None:
        loaded = server.registry.loaded
        catalog.add(initial.name, initial.target, _adapters(loaded[1] if loaded else None))
    mount(app, Parts(ServerModels(server), catalog, downloads=settings.downloads))


def parts_for(model: LoadedModel | None, *, models_dir: Path | None = None) -> Parts:
    """Build the parts of a page whose model is in this process."""
    from gptq_loader_extensions.gradio.jobs.local_models import LocalModels
    from gptq_loader_extensions.gradio.page import Parts
    from gptq_loader_extensions.gradio.storage.catalog import Catalog
    from gptq_loader_extensions.gradio.tabs.header import entry_name

    catalog = Catalog(models_dir=models_dir)
    if model is None:
        return Parts(LocalModels(), catalog)
    name = entry_name(model)
    plan = model.plan
    catalog.add(name, "demo" if name == "demo" else plan.path, _adapters(model))
    return Parts(LocalModels(Loaded(name, model)), catalog)


def _adapters(model: LoadedModel | None) -> dict[str, Path]:
    """Return where the adapters lie that a page loads again with the model it was started with."""
    return {} if model is None or model.adapters is None else dict(model.adapters.folders)


def _check_gradio() -> None:
    try:
        import gradio  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise PluginError(
            f"the page needs gradio, which cannot be imported: {error}",
            hint="pip install 'gptq-loader-plugin[gradio]'",
        ) from error


def _quiet() -> dict[str, Any]:
    """Return the options that keep gradio from sending, storing or accepting more than it must."""
    from starlette.middleware import Middleware

    from gptq_loader_extensions.gradio.page import launch_style

    return {
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,
        "footer_links": [],
        "max_file_size": UPLOADS,
        "app_kwargs": {"middleware": [Middleware(PageOnly)]},
        **launch_style(),
    }


class PageOnly:
    """Tell browsers, with every response, to fetch nothing but this page's own files.

    Args:
        app: the application that responds.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and add the policy to its response."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", CONTENT_POLICY)
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _bound_port(host: str, port: int | None) -> int:
    """Bind the address once, so that a failure has a clear message; return the port.

    Raises:
        OptionInvalid: the port is taken or not allowed, or the host is not this machine's.
    """
    if port is not None and not 0 <= port < 2**16:
        raise OptionInvalid(
            f"{port} is not a valid port: use 1 to 65535", hint="choose another with --port"
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
        message, hint = _explain(host, port, error)
        raise OptionInvalid(message, hint=hint) from error


def _explain(host: str, port: int | None, error: OSError) -> tuple[str, str]:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is already in use", (
            "choose another with --port, or leave it out to use the first free one from 7860"
        )
    if error.errno == errno.EACCES:
        return f"port {port} is not allowed: {error.strerror}", "choose one above 1023"
    return f"{host} is not an address of this machine: {error.strerror or error}", (
        "serve on 127.0.0.1 for this machine only, or on 0.0.0.0 for its whole network"
    )


def _has_display() -> bool:
    """Return whether a browser window can open; otherwise webbrowser may start a text browser."""
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _show(url: str) -> None:
    """Open the page in a browser; where there is none, the address on stderr has to do."""
    try:
        webbrowser.open(url)
    except (webbrowser.Error, OSError) as error:
        logger.info("no browser could be opened: %s", error)
