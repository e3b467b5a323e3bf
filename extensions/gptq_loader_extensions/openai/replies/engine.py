"""What requests ask of whatever writes their replies, and what it tells them.

An engine is the only thing that touches a model: `BatchEngine` is the one there is.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import LogitsProcessor

    from gptq_loader_extensions.openai.replies.scores import Step
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = [
    "Ended",
    "Engine",
    "Event",
    "Failed",
    "Ready",
    "ReplyChunk",
    "Run",
    "Work",
]


@dataclass(frozen=True, slots=True)
class Run:
    """One reply to generate.

    Attributes:
        ids: the prompt's tokens.
        options: how to sample.
        stop: the template's end texts.
        processors: change the logits before a token is picked.
        top: how many of the likeliest tokens to report with each token's probability; None reports
            nothing.
    """

    ids: Sequence[int]
    options: GenerateOptions
    stop: Sequence[str] = ()
    processors: Sequence[LogitsProcessor] = ()
    top: int | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is there and the request was prepared with it.

    Attributes:
        model: its name.
        value: whatever the preparation found out.
        runs: the replies that follow.
    """

    model: str
    value: Any
    runs: Sequence[Run]


@dataclass(frozen=True, slots=True)
class ReplyChunk:
    """A piece of a reply.

    Attributes:
        index: which run's.
        piece: the text.
        steps: the tokens that were picked since the piece before, where they were asked for.
    """

    index: int
    piece: Piece
    steps: Sequence[Step] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The work ended in an error."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Ended:
    """The work is done."""


Event = Ready | ReplyChunk | Failed | Ended


@dataclass(eq=False, slots=True)
class Work:
    """What one request wants done.

    Attributes:
        model: the model's name; None takes the one that is loaded.
        prepare: called with the model, on the engine's thread; gives a value for the request, and
            the replies to generate.
        send: takes events, on the engine's thread; must not block.
        cancel: ends the work within a token once it is set.
        arrived: when it was handed in, by time.monotonic.
        alone: called in place of all that, on the engine's thread, once nothing else runs.
    """

    model: str | None
    prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]]
    send: Callable[[Event], object]
    cancel: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.monotonic)
    alone: Callable[[], object] | None = None


class Engine(Protocol):
    """Takes work, and sends events as it is done."""

    def submit(self, work: Work) -> None:
        """Queue work; refuse it with an `ApiError` where too much waits already."""
        ...

    def cancel(self, work: Work) -> None:
        """End work: running, its reply ends within a token; waiting, it fails."""
        ...

    def counts(self) -> tuple[int, int]:
        """Count the works that run, and those that wait."""
        ...
