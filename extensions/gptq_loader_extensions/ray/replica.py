"""One replica: it loads the model, and answers with the server's own application."""

# Where the host is not installed, pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gptq_loader_extensions.ray.options import DeploymentOptions

__all__ = ["REPLICA", "Replica"]

REPLICA = b"x-replica"

# No folder of models: a replica that loaded another one would answer differently from its peers.
NO_FOLDERS = {"GPTQ_LOADER_MODELS": os.pathsep}


class Replica:
    """One model in one process, which generates many replies at a time.

    Args:
        options: which model, and how to serve it.
    """

    def __init__(self, options: DeploymentOptions) -> None:
        import gptq_loader_plugin as gptq
        from gptq_loader_extensions.openai.replies.batching import BatchEngine
        from gptq_loader_extensions.openai.replies.model_registry import ModelRegistry
        from gptq_loader_extensions.openai.server import Server
        from gptq_loader_extensions.openai.serving import log_requests

        settings, load_options = options.settings(), options.load_options()
        load = partial(gptq.load, options=load_options)
        registry = ModelRegistry(settings, load=load, environ=NO_FOLDERS)
        registry.load_initial(options.name or options.reference, load(options.reference))
        self._engine = BatchEngine(
            registry, max_queue=settings.max_queue, max_num_seqs=settings.max_num_seqs
        )
        self._server = Server(settings, registry, self._engine)
        log_requests()  # to stderr, which Ray Serve keeps in its own logs

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name Ray Serve calls
        """Return the application that answers requests."""
        from ray import serve

        from gptq_loader_extensions.openai.app import create_app

        app = create_app(self._server)
        app.add_middleware(ReplicaHeader, name=serve.get_replica_context().replica_id.unique_id)
        return app

    def check_health(self) -> None:
        """Tell Ray Serve, by an error, that this replica must be replaced.

        Raises:
            RuntimeError: the engine's thread has ended.
        """
        if not self._engine.alive():
            raise RuntimeError("the thread that generates replies has ended")


class ReplicaHeader:
    """Name in a header the replica that answered: the logs are by replica.

    Args:
        app: the application.
        name: the replica's name in Ray's logs.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._header = (REPLICA, name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, and add the header to its answer."""

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), self._header]}
            await send(message)

        await self._app(scope, receive, send_with_header)
