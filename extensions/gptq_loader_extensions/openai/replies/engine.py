"""What requests hand to the engine, and the events it sends back.

Nothing but the engine's thread runs a model: `BatchEngine` is the one there is. Prompts are made
on other threads, so that no reply waits for another's prompt.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import LogitsProcessor

    from gptq_loader_extensions.openai.replies.scores import ScoredToken
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = [
    "Ended",
    "EngineRequest",
    "Event",
    "Failed",
    "GenerationEngine",
    "ReplyChunk",
    "Run",
    "Started",
]


@dataclass(frozen=True, slots=True)
class Run:
    """One reply to generate.

    Attributes:
        ids: the prompt's tokens.
        options: how to sample.
        stop: the template's end texts.
        processors: change the logits before a token is sampled.
        top_logprobs: how many tokens to report at each position, the most probable first, with
            their log-probabilities; None reports none, not even the sampled token's.
        shown: special tokens that are to be in the text.
        adapter: the LoRA adapter to write it with; None for the model alone.
    """

    ids: Sequence[int]
    options: GenerateOptions
    stop: Sequence[str] = ()
    processors: Sequence[LogitsProcessor] = ()
    top_logprobs: int | None = None
    shown: Sequence[str] = ()
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The model is loaded and the request was prepared with it.

    Attributes:
        model: its name.
        value: what the preparation returned.
        runs: the replies that follow.
    """

    model: str
    value: Any
    runs: Sequence[Run]


@dataclass(frozen=True, slots=True)
class ReplyChunk:
    """A piece of a reply.

    Attributes:
        index: the run it belongs to.
        piece: the text.
        tokens: the tokens sampled since the piece before, where log-probabilities are requested.
    """

    index: int
    piece: Piece
    tokens: Sequence[ScoredToken] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The work ended in an error."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Ended:
    """The work is done."""


Event = Started | ReplyChunk | Failed | Ended


@dataclass(eq=False, slots=True)
class EngineRequest:
    """What one request hands to the engine.

    Attributes:
        model: the model's name; None takes the one that is loaded.
        prepare: called with the model and a tokenizer of the thread's own, on another thread than
            the engine's; returns a value for the request, and the replies to generate.
        send: receives events, on any thread; must not block.
        cancel: ends the replies within a token once it is set.
        compute: called with the model and the value, once that is prepared; each step that it
            yields from runs on the engine's thread, between two tokens of other replies.
        exclusive: called in place of all that, on the engine's thread, while no reply is generated.
        size: the bytes of the request: small ones do not wait for large ones to be prepared.
        at_once: whether it needs no more than the tokenizer of the model that is loaded, so that
            it neither waits for the requests before it nor for another model.
    """

    model: str | None
    prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]]
    send: Callable[[Event], object]
    cancel: threading.Event = field(default_factory=threading.Event)
    compute: Callable[[LoadedModel, Any], Iterator[None]] | None = None
    exclusive: Callable[[], object] | None = None
    size: int = 0
    at_once: bool = False


class GenerationEngine(Protocol):
    """Takes requests, and sends events as their replies are generated."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; refuse it with an `ApiError` where too many wait already."""
        ...

    def cancel(self, request: EngineRequest) -> None:
        """Cancel a request: running, its replies end within a token; waiting, it fails."""
        ...

    def counts(self) -> tuple[int, int]:
        """Count the requests that run, and those that wait or are prepared."""
        ...
