"""Do the work of requests, one after the other, in the order they came.

This is the only place that touches a model. Whatever batches requests one day stands here instead:
it takes the same `Work` and sends the same events.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from gptq_loader_extensions.openai.errors import ApiError, as_api_error, is_out_of_memory
from gptq_loader_extensions.openai.scores import Scores, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import LogitsProcessor

    from gptq_loader_extensions.openai.shelf import Shelf
    from gptq_loader_plugin.generate import Piece
    from gptq_loader_plugin.loaded import LoadedModel
    from gptq_loader_plugin.options import GenerateOptions

__all__ = [
    "Ended",
    "Engine",
    "Event",
    "Failed",
    "Ready",
    "Run",
    "Said",
    "SerialEngine",
    "Work",
]

logger = logging.getLogger(__name__)


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
class Said:
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


Event = Ready | Said | Failed | Ended


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
    """

    model: str | None
    prepare: Callable[[LoadedModel], tuple[Any, Sequence[Run]]]
    send: Callable[[Event], object]
    cancel: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.monotonic)


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


class SerialEngine:
    """One request at a time, first come first served.

    Args:
        shelf: gives models by name.
        max_queue: how many works may wait.
    """

    def __init__(self, shelf: Shelf, *, max_queue: int) -> None:
        self._shelf = shelf
        self._max_queue = max_queue
        self._waiting: deque[Work] = deque()
        self._running: Work | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="gptq-engine", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        """Queue work.

        Raises:
            ApiError: too much waits already, or the server is stopping.
        """
        with self._changed:
            if self._closed:
                raise _stopping()
            if len(self._waiting) >= self._max_queue:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests are waiting already; try again in a moment",
                    kind="rate_limit_error",
                    code="queue_full",
                    headers={"Retry-After": "5"},
                )
            self._waiting.append(work)
            self._changed.notify_all()

    def cancel(self, work: Work) -> None:
        """End work: running, its reply ends within a token; waiting, it fails."""
        work.cancel.set()
        with self._changed:
            if work not in self._waiting:
                return
            self._waiting.remove(work)
        work.send(Failed(_stopped()))

    def counts(self) -> tuple[int, int]:
        """Count the works that run, and those that wait."""
        with self._changed:
            return int(self._running is not None), len(self._waiting)

    def stop(self) -> None:
        """Take no more work, and end all there is within a token."""
        with self._changed:
            self._closed = True
            for work in (*self._waiting, *filter(None, (self._running,))):
                work.cancel.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, wait for the thread to end, and close the model."""
        self.stop()
        self._thread.join()
        self._shelf.close()

    def _serve(self) -> None:
        while (work := self._next()) is not None:
            try:
                self._do(work)
            except Exception as error:  # noqa: BLE001 - one request's fault must not end the others
                self._failed(work, error)
            finally:
                with self._changed:
                    self._running = None

    def _next(self) -> Work | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                for work in self._waiting:
                    work.send(Failed(_stopping()))
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _do(self, work: Work) -> None:
        if work.cancel.is_set():
            raise _stopped()
        name, model = self._shelf.take(work.model)
        value, runs = work.prepare(model)
        work.send(Ready(name, value, runs))
        for index, run in enumerate(runs):
            self._generate(work, model, index, run)
        work.send(Ended())

    def _generate(self, work: Work, model: LoadedModel, index: int, run: Run) -> None:
        from gptq_loader_plugin.generate import Piece

        if work.cancel.is_set():  # and its prompt need not be read
            work.send(Said(index, Piece("", 0, "cancelled")))
            return
        scores = None if run.top is None else Scores(run.top)
        pieces = model.stream_ids(
            run.ids,
            run.options,
            stop=run.stop,
            cancel=work.cancel,
            processors=run.processors,
            watch=None if scores is None else scores.watch,
        )
        for piece in pieces:
            if piece.finish == "cancelled" and self._closed:
                raise _stopping()
            work.send(Said(index, piece, () if scores is None else scores.taken()))

    def _failed(self, work: Work, error: Exception) -> None:
        if is_out_of_memory(error):
            self._shelf.forget()
        elif as_api_error(error).status == 500:
            logger.error("a request failed", exc_info=error)
        work.send(Failed(error))


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping")


def _stopped() -> ApiError:
    return ApiError(503, "stopped before it began", kind="server_error", code="stopped")
