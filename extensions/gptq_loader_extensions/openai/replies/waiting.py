"""The requests that wait, in the order they came: which to prepare next, and which to begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptq_loader_extensions.openai.replies.engine import EngineRequest, Run

__all__ = ["WaitingRequests"]

SMALL_REQUEST = 1 << 15  # bytes: prepared in some 10 ms
# Tokens of prompts that are ready before their turn: a prompt is some 40 bytes a token.
MAX_READY_TOKENS = 2_000_000


@dataclass(slots=True)
class _Place:
    """How far a request has got.

    Attributes:
        taken: whether a thread prepares it, or has done so.
        prepared: the value and the replies, once they are there.
        model_loaded: whether its model was loaded for it, whatever that is called.
    """

    taken: bool = False
    prepared: tuple[Any, Sequence[Run]] | None = None
    model_loaded: bool = False


class WaitingRequests:
    """The requests that wait, whether they are being prepared or not.

    Nothing here locks: `BatchEngine` does.

    Args:
        max_queue: how many may wait.
    """

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._places: dict[EngineRequest, _Place] = {}
        self._ready_tokens = 0

    def __len__(self) -> int:
        """Count them."""
        return len(self._places)

    def __iter__(self) -> Iterator[EngineRequest]:
        """Yield them in the order they came."""
        return iter([*self._places])

    def add(self, request: EngineRequest) -> None:
        """Add a request.

        Raises:
            ApiError: too many wait already.
        """
        if len(self._places) >= self._max_queue:
            raise ApiError(
                429,
                f"{len(self._places)} requests are waiting already; try again in a moment",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "5"},
            )
        self._places[request] = _Place()

    def add_first(self, request: EngineRequest) -> None:
        """Put back a request whose model has been loaded: it is the next one."""
        self._places = {request: _Place(model_loaded=True), **self._places}

    def remove(self, request: EngineRequest) -> bool:
        """Remove a request; return whether it was here."""
        place = self._places.pop(request, None)
        if place is not None:
            self._ready_tokens -= _count_tokens(place.prepared)
        return place is not None

    def next_to_prepare(
        self, loaded: str | None, *, switching: bool, small: bool
    ) -> EngineRequest | None:
        """Return the first request that nobody prepares, and mark it.

        Args:
            loaded: the name of the loaded model.
            switching: whether another one is taking its place.
            small: whether to leave large requests to another thread.
        """
        if loaded is None:
            return None
        in_turn = not switching and self._ready_tokens <= MAX_READY_TOKENS
        for request, place in self._places.items():
            if not request.at_once:
                in_turn = in_turn and not self._needs_load(request, loaded)
            large = small and request.size > SMALL_REQUEST
            if (in_turn or request.at_once) and not place.taken and not large:
                place.taken = True
                return request
        return None

    def set_prepared(self, request: EngineRequest, prepared: tuple[Any, Sequence[Run]]) -> bool:
        """Keep what a request was prepared to; return False where it does not wait any longer."""
        place = self._places.get(request)
        if place is None:
            return False
        place.prepared = prepared
        self._ready_tokens += _count_tokens(prepared)
        return True

    def next_to_begin(self, loaded: str | None, *, running: bool) -> EngineRequest | None:
        """Return the first request that can begin now.

        A request for another model, or for none at all, waits until all before it have ended, and
        those behind it wait for it: no request is overtaken for ever.

        Args:
            loaded: the name of the loaded model.
            running: whether any request runs.
        """
        unprepared = False
        for request, place in self._places.items():
            if request.at_once:
                continue
            if self._needs_load(request, loaded):
                return None if running or unprepared else request
            if place.prepared is not None:
                return request
            unprepared = True
        return None

    def pop(self, request: EngineRequest) -> tuple[Any, Sequence[Run]] | None:
        """Remove a request; return what it was prepared to, where it was."""
        prepared = self._places[request].prepared
        self.remove(request)
        return prepared

    def _needs_load(self, request: EngineRequest, loaded: str | None) -> bool:
        if request.exclusive is not None:
            return True
        if self._places[request].model_loaded:
            return False
        return loaded is None or request.model not in (None, loaded)


def _count_tokens(prepared: tuple[Any, Sequence[Run]] | None) -> int:
    if prepared is None:
        return 0
    return sum({id(run.ids): len(run.ids) for run in prepared[1]}.values())
