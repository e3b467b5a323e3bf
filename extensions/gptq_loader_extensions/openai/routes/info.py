"""The routes about the server: models, health, metrics; and the refusal of embeddings."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

from gptq_loader_extensions.openai.errors import ApiError, no_embeddings
from gptq_loader_extensions.openai.schema.openapi import ERRORS, NOT_IMPLEMENTED
from gptq_loader_plugin.system.memory import resident_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from gptq_loader_extensions.openai.replies.model_registry import ServedModel
    from gptq_loader_extensions.openai.server import Server

__all__ = ["info_routes"]


def info_routes(server: Server) -> APIRouter:
    """Return the routes."""
    router = APIRouter(responses=ERRORS)

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """List the models that may be named."""
        served = await asyncio.to_thread(server.registry.list_models)
        if "anthropic-version" in request.headers:
            data = [_anthropic_json(model) for model in served]
            ids: list[str | None] = [model.name for model in served] or [None]
            return {"data": data, "first_id": ids[0], "last_id": ids[-1], "has_more": False}
        return {"object": "list", "data": [_model_json(model) for model in served]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe one model."""
        for served in await asyncio.to_thread(server.registry.list_models):
            if served.name == name:
                return _model_json(served)
        raise ApiError(
            404,
            f"the model {name[:200]!r} does not exist here; GET /v1/models lists those that do",
            param="model",
            code="model_not_found",
        )

    @router.post("/v1/embeddings", responses=NOT_IMPLEMENTED)
    async def embeddings(request: Request) -> None:
        """Refuse: a model that writes text makes no useful embeddings."""
        del request
        raise no_embeddings()

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, Any]:
        """Return that the server runs, and what it has loaded."""
        loaded = server.registry.loaded
        running, waiting = server.engine.counts()
        return {
            "status": "ok",
            "model": None if loaded is None else loaded[0],
            "running": running,
            "waiting": waiting,
        }

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Return the metrics, in Prometheus' text format."""
        text = server.metrics.render(_state(server))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return router


def _model_json(model: ServedModel) -> dict[str, Any]:
    described = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "gptq-loader",
    }
    return described if model.parent is None else {**described, "parent": model.parent}


def _anthropic_json(model: ServedModel) -> dict[str, Any]:
    created = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": created,
    }


def _state(server: Server) -> Iterator[Metric]:
    """Yield what is read when it is asked for: the queue, the memory, and which model is loaded."""
    running, waiting = server.engine.counts()
    loaded = server.registry.loaded
    weights = 0 if loaded is None else loaded[1].plan.weight_bytes
    for name, documentation, value in (
        ("gptq_requests_running", "Requests whose replies are being generated", running),
        ("gptq_requests_waiting", "Requests in the queue", waiting),
        ("gptq_model_weight_bytes", "Memory of the loaded model's weights", weights),
        ("process_resident_memory_bytes", "Memory of this process", resident_memory()),
    ):
        yield GaugeMetricFamily(name, documentation, value=value)
    if loaded is None:
        return
    name, model = loaded
    labels = {
        "model": name,
        "kernels": ",".join(model.plan.kernels()),
        "device": str(model.plan.device),
        "dtype": model.plan.dtype,
    }
    yield InfoMetricFamily("gptq_model", "The loaded model", value=labels)
