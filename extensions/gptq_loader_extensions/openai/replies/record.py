"""What is recorded of one request, for the log, the metrics and the reply."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import Request

    from gptq_loader_extensions.openai.replies.engine import ReplyChunk, Started

__all__ = ["RequestRecord", "request_record"]


@dataclass(slots=True)
class RequestRecord:
    """What is recorded of one request.

    Attributes:
        request_id: sent back in the header x-request-id.
        began: when it arrived, by time.monotonic.
        model: the name of the model that answered.
        prompt_tokens: how many tokens its prompts have together.
        tokens: how many were generated, by reply.
        finish: why the last reply ended.
        started_at: when the engine began it.
        first_chunk_at: when the first chunk of text was ready.
        ignored: options that had no effect.
    """

    request_id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    began: float = field(default_factory=time.monotonic)
    model: str | None = None
    prompt_tokens: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    finish: str | None = None
    started_at: float | None = None
    first_chunk_at: float | None = None
    ignored: tuple[str, ...] = ()

    def started(self, event: Started) -> None:
        """Record that the engine has begun the request."""
        self.model = event.model
        self.started_at = time.monotonic()
        self.prompt_tokens = sum(len(run.ids) for run in event.runs)

    def chunk(self, event: ReplyChunk) -> None:
        """Record a chunk of text."""
        self.first_chunk_at = self.first_chunk_at or time.monotonic()
        self.tokens[event.index] = event.piece.tokens
        self.finish = event.piece.finish or self.finish


def request_record(request: Request) -> RequestRecord:
    """Return the record of a request."""
    record: RequestRecord = request.state.record
    return record
