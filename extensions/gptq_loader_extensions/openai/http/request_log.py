"""Log one line for each request: route, seconds, tokens; never any text of it."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.replies.record import RequestRecord

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gptq_loader_extensions.openai.http.metrics import Metrics

__all__ = ["CLIENT_CLOSED_REQUEST", "LOGGER", "RequestLog"]

LOGGER = "gptq_loader_plugin.requests"  # the logger whose every message is a JSON object
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnected

logger = logging.getLogger(LOGGER)


class RequestLog:
    """Log every request, count it, and send its id in a header.

    Args:
        app: the application.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, and log how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord()
        scope.setdefault("state", {})["record"] = record
        status = CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                header = (b"x-request-id", record.request_id.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._log(scope, record, status)

    def _log(self, scope: Scope, record: RequestRecord, status: int) -> None:
        now = time.monotonic()
        route = getattr(scope.get("route"), "path", None) or "other"
        tokens = sum(record.tokens.values())
        self._metrics.requests.labels(route=route, status=str(status)).inc()
        self._metrics.request_seconds.observe(now - record.began)
        if record.started_at is not None:
            self._metrics.prompt_tokens.inc(record.prompt_tokens)
            self._metrics.generated_tokens.inc(tokens)
            self._metrics.replies.inc(len(record.tokens))
            self._metrics.queue_seconds.observe(record.started_at - record.began)
        if record.first_chunk_at is not None:
            self._metrics.first_token_seconds.observe(record.first_chunk_at - record.began)
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": record.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(now - record.began, 4),
        }
        if record.started_at is not None:
            line |= {
                "model": record.model,
                "prompt_tokens": record.prompt_tokens,
                "tokens": tokens,
                "finish": record.finish,
                "queue_seconds": round(record.started_at - record.began, 4),
            }
        if record.first_chunk_at is not None:
            line["first_token_seconds"] = round(record.first_chunk_at - record.began, 4)
        if record.ignored:
            line["ignored_options"] = record.ignored
        logger.info("%s", json.dumps(line))
