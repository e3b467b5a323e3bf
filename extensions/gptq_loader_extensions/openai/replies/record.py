"""What is known of one request, for the log, the metrics and the reply."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import Request

    from gptq_loader_extensions.openai.replies.engine import ReplyChunk, Started

__all__ = ["Record", "record_of"]


@dataclass(slots=True)
class Record:
    """What is known of one request.

    Attributes:
        request_id: sent back in the header x-request-id.
        began: when it came, by time.monotonic.
        model: the name of the model that answered.
        prompt_tokens: how many tokens its prompts have together.
        tokens: how many were generated, by reply.
        finish: why the last reply ended.
        ready: when a model had it.
        first: when the first piece of text was there.
        ignored: options that had no effect.
    """

    request_id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    began: float = field(default_factory=time.monotonic)
    model: str | None = None
    prompt_tokens: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    finish: str | None = None
    ready: float | None = None
    first: float | None = None
    ignored: tuple[str, ...] = ()

    def started(self, event: Started) -> None:
        """Take down that a model has the request."""
        self.model = event.model
        self.ready = time.monotonic()
        self.prompt_tokens = sum(len(run.ids) for run in event.runs)

    def chunk(self, event: ReplyChunk) -> None:
        """Take down a piece of text."""
        self.first = self.first or time.monotonic()
        self.tokens[event.index] = event.piece.tokens
        self.finish = event.piece.finish or self.finish


def record_of(request: Request) -> Record:
    """Find what is taken down of a request."""
    record: Record = request.state.record
    return record
