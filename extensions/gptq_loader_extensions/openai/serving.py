"""Bind the address, print how to use it, and serve until Ctrl-C."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import sys
import threading
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from gptq_loader_extensions.openai.app import create_app
from gptq_loader_extensions.openai.http.request_log import LOGGER
from gptq_loader_extensions.openai.replies.batching import BatchEngine
from gptq_loader_extensions.openai.replies.model_registry import ModelRegistry
from gptq_loader_extensions.openai.server import Server
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.host import Checkable, Mountable, Ready
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.system.heap import share_heaps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gptq_loader_extensions.openai.settings import Settings
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["bind", "log_requests", "serve"]

CANCEL_SECONDS = 5  # for cancelled replies to end; a large model's token may take one


def serve(
    settings: Settings,
    *,
    model: LoadedModel | None,
    reference: str | None,
    load: Callable[[str | Path], LoadedModel] | None,
    stop: threading.Event | None = None,
) -> None:
    """Serve until Ctrl-C; running replies get a few seconds to end.

    Args:
        settings: how to serve.
        model: the model that is loaded already.
        reference: what it was loaded by, or what to load now; None loads the first one that is
            requested.
        load: loads other models; None is `gptq_loader_plugin.load` with its defaults.
        stop: set when the server ends, to end a load that is under way.

    Raises:
        OptionInvalid: the address cannot be served on, or there is no model to serve.
    """
    if load is None:
        import gptq_loader_plugin as gptq

        load = gptq.load
    share_heaps()
    with closing(bind(settings.host, settings.port)) as listening:
        registry = ModelRegistry(settings, load=load)
        registry.load_initial(reference, model)
        page = _page()
        if not registry.list_models() and not settings.downloads and page is None:
            raise OptionInvalid(
                "there is no model to serve",
                hint="name one: gptq-loader serve REF; or a folder of models: --models-dir FOLDER",
            )
        engine = BatchEngine(
            registry, max_queue=settings.max_queue, max_num_seqs=settings.max_num_seqs
        )
        server = Server(settings, registry, engine)
        log_requests()
        _announce(server, listening, has_page=page is not None)
        config = uvicorn.Config(
            create_app(server, page=None if page is None else partial(page.mount, server=server)),
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=settings.grace + CANCEL_SECONDS,
        )
        try:
            asyncio.run(
                _run(
                    uvicorn.Server(config),
                    engine,
                    listening,
                    stop or threading.Event(),
                    grace=settings.grace,
                )
            )
        finally:
            engine.close()


def _page() -> Mountable | None:
    """Return a host whose page can be mounted, and whose program is installed."""
    for host in Plugins(installed=True).hosts():
        if not isinstance(host, Mountable):
            continue
        if not isinstance(host, Checkable) or isinstance(host.check(), Ready):
            return host
    return None


async def _run(
    server: uvicorn.Server,
    engine: BatchEngine,
    listening: socket.socket,
    stop: threading.Event,
    *,
    grace: float,
) -> None:
    """Serve until a signal; then wait for the replies under way, and cancel those that remain."""
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    while not (server.should_exit or serving.done()):  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.1)
    await asyncio.wait({serving}, timeout=grace)
    stop.set()
    engine.stop()
    await serving


def bind(host: str, port: int) -> socket.socket:
    """Bind an address and listen on it.

    Raises:
        OptionInvalid: the port is taken or not allowed, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
    except OSError as error:
        raise OptionInvalid(
            f"{host} is not an address of this machine: {error.strerror or error}",
            hint="serve on 127.0.0.1 for this machine alone, or 0.0.0.0 for its whole network",
        ) from error
    listening = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise OptionInvalid(
                f"port {port} is taken", hint="choose another with --port"
            ) from error
        raise OptionInvalid(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            hint="serve on 127.0.0.1 and a port above 1023",
        ) from error
    return listening


def _announce(server: Server, listening: socket.socket, *, has_page: bool = False) -> None:
    """Print what is served, where, and how to point a client at it."""
    settings, loaded = server.settings, server.registry.loaded
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host  # noqa: S104 - compared, not bound
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    names = [model.name for model in server.registry.list_models()]
    key = "your key" if settings.api_key else "anything"
    lines = [
        *([f"the page is at {url}"] if has_page else []),
        f"serving {loaded[0]}: {loaded[1].plan.headline()}"
        if loaded
        else "serving no model yet: the first request loads the one it names",
        f"  the API is at {url}/v1, for any client of OpenAI's (API key: {key})",
        f"  Kobold clients take {url}",
        f"  models: {', '.join(names)}",
        *(
            ["  anyone who can reach this address may use it: there is no key"]
            if settings.no_auth and settings.api_key is None
            else []
        ),
        "  Ctrl-C ends it",
    ]
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()
    if settings.as_json:
        kernels = {} if loaded is None else loaded[1].plan.kernels()
        status = {
            "url": url,
            "model": loaded[0] if loaded else None,
            "kernels": kernels,
            "models": names,
        }
        sys.stdout.write(json.dumps(status) + "\n")
        sys.stdout.flush()


def log_requests() -> None:
    """Write a line for each request to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger(LOGGER)
    requests.setLevel(logging.INFO)
    requests.addHandler(handler)
    requests.propagate = False
