"""The routes of Ollama about models: what there is, what is loaded; loading and unloading."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gptq_loader_extensions.openai.errors import ApiError, no_embeddings
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.schema.ollama import (
    OllamaPull,
    OllamaShow,
    keep_seconds,
    model_name,
)
from gptq_loader_extensions.openai.schema.openapi import OLLAMA_ERRORS, OllamaErrorBody

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gptq_loader_extensions.openai.replies.model_registry import ServedModel
    from gptq_loader_extensions.openai.schema.ollama import OllamaBase
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["LINES", "and_then", "load_or_unload", "now", "ollama_model_routes", "unload_afterwards"]

VERSION = "0.13.0"  # of Ollama, whose routes these are; clients ask for a minimum
LINES = "application/x-ndjson"
FOREVER = "9999-12-31T23:59:59Z"  # until a model is unloaded: when is for requests to say
NO_EMBEDDINGS: dict[int | str, dict[str, Any]] = {
    501: {"description": "this server makes no embeddings", "model": OllamaErrorBody}
}
PULLED: dict[int | str, dict[str, Any]] = {
    200: {"description": "that it is here, as a whole or in lines", "content": {LINES: {}}}
}


def ollama_model_routes(server: Server) -> APIRouter:
    """Return the routes."""
    router = APIRouter(responses=OLLAMA_ERRORS, route_class=JsonRoute)

    @router.head("/api/tags", include_in_schema=False)
    @router.get("/api/tags")
    async def tags() -> dict[str, Any]:
        """List the models that may be named."""
        models = await asyncio.to_thread(server.registry.list_models)
        return {"models": [_describe(model) for model in models]}

    @router.get("/api/ps")
    async def running() -> dict[str, Any]:
        """Name the model that is in memory."""
        loaded = server.registry.loaded
        if loaded is None:
            return {"models": []}
        models = await asyncio.to_thread(server.registry.list_models)
        return {"models": [_running(it, loaded[1]) for it in models if it.name == loaded[0]]}

    @router.post("/api/show")
    async def show(body: OllamaShow, request: Request) -> dict[str, Any]:
        """Describe a model; one that is not loaded is loaded for it."""
        name = model_name(body.model or body.name)
        return await server.with_prompts(request, _show, model=name)

    @router.head("/api/version", include_in_schema=False)
    @router.get("/api/version")
    async def version() -> dict[str, str]:
        """Return the version of Ollama whose routes these are."""
        return {"version": VERSION}

    @router.post("/api/pull", responses=PULLED, response_model=None)
    async def pull(body: OllamaPull) -> Response:
        """Answer that a model is here, as clients make sure of first; nothing is downloaded."""
        await _check_here(server, model_name(body.model or body.name))
        status = {"status": "success"}
        if body.stream is False:
            return JSONResponse(status)
        return Response(json.dumps(status) + "\n", media_type=LINES)

    @router.post("/api/embed", responses=NO_EMBEDDINGS)
    @router.post("/api/embeddings", responses=NO_EMBEDDINGS, include_in_schema=False)
    async def embed(request: Request) -> None:
        """Refuse: a model that writes text makes no useful embeddings."""
        del request
        raise no_embeddings()

    return router


def now() -> str:
    """Return the time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


async def load_or_unload(
    server: Server, request: Request, body: OllamaBase, empty: dict[str, Any]
) -> Response:
    """Load a model, which clients do by asking for nothing, or unload it by `keep_alive: 0`.

    Args:
        server: what the routes share.
        request: the request.
        body: what it asks for.
        empty: an empty reply, as the route has one.

    Raises:
        ApiError: there is no such model, or it cannot be loaded.
    """
    name = model_name(body.model)
    unloads = keep_seconds(body.keep_alive) == 0
    if unloads:
        answered = await asyncio.to_thread(server.registry.resolve_name, name)
        await server.unload(answered)
    else:
        await server.with_model(request, lambda _: None, model=name)
        loaded = server.registry.loaded
        answered = name or "" if loaded is None else loaded[0]
    answer = {"model": answered, "created_at": now(), **empty, "done": True}
    return JSONResponse({**answer, "done_reason": "unload" if unloads else "load"})


async def unload_afterwards(server: Server, body: OllamaBase) -> Callable[[], object]:
    """Return what is to be called when a reply has ended: it unloads the model, if asked to.

    Raises:
        ApiError: there is no such model.
    """
    if keep_seconds(body.keep_alive) != 0:
        return lambda: None
    name = await asyncio.to_thread(server.registry.resolve_name, model_name(body.model))

    def unload() -> None:
        with contextlib.suppress(ApiError):  # the queue is full: others want the model
            server.unload(name).add_done_callback(lambda it: it.cancelled() or it.exception())

    return unload


async def and_then(lines: AsyncIterator[str], then: Callable[[], object]) -> AsyncIterator[str]:
    """Yield lines, and call a function when they have ended or nobody reads on."""
    try:
        async for line in lines:
            yield line
    finally:
        then()


async def _check_here(server: Server, name: str | None) -> None:
    models = await asyncio.to_thread(server.registry.list_models)
    if name in [model.name for model in models]:
        return
    more = (
        "name it in a request, which downloads it"
        if server.settings.downloads
        else ("fetch it with gptq-loader download, or restart the server with --allow-downloads")
    )
    raise ApiError(
        404,
        f"the model {(name or '')[:200]!r} is not on this machine; {more}",
        param="model",
        code="model_not_found",
    )


def _describe(model: ServedModel) -> dict[str, Any]:
    modified = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    # Ollama's clients show the beginning of it. Weights are not read for a list, so it is of what
    # changes with them.
    identity = f"{model.name}\n{model.created}\n{model.size_bytes}"
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": modified,
        "size": model.size_bytes,
        "digest": hashlib.sha256(identity.encode()).hexdigest(),
        "details": {
            "parent_model": model.parent or "",
            "format": "gptq",
            "family": "",
            "families": [],
            "parameter_size": "",
            "quantization_level": "",
        },
    }


def _running(model: ServedModel, loaded: LoadedModel) -> dict[str, Any]:
    """Describe the model that is loaded, as one of those in memory."""
    plan = loaded.plan
    described = _describe(model)
    described["details"] |= _details(loaded)
    return {
        **described,
        "size": plan.weight_bytes,
        "size_vram": 0 if plan.device.type == "cpu" else plan.weight_bytes,
        "context_length": loaded.context,
        "expires_at": FOREVER,
    }


def _details(model: LoadedModel) -> dict[str, Any]:
    family = str(model.model.config.model_type)
    return {
        "family": family,
        "families": [family],
        "quantization_level": f"{model.config.bits}-bit",
    }


def _show(model: LoadedModel) -> dict[str, Any]:
    """Describe the model that is loaded."""
    template = getattr(model.template, "text", "")
    details = _details(model)
    family = details["family"]
    capabilities = ["completion", "tools"]
    if "</think>" in template:
        capabilities.append("thinking")
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": {"parent_model": "", "format": "gptq", "parameter_size": "", **details},
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": model.context,
            f"{family}.vocab_size": model.vocab_size,
        },
        "capabilities": capabilities,
    }
