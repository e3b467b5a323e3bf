"""How long a quantisation still takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["TimeLeft", "say_left"]


def say_left(seconds: float) -> str:
    """Say how long something still takes: "2 min 5 s left"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{f'{minutes} min ' if minutes else ''}{rest} s left"


class TimeLeft:
    """Foretell from the blocks that are done, whole: their layers, and what is between layers.

    Before the first block is done it goes by layers alone. What an earlier run has done counts for
    nothing, since it took none of this run's time.

    Args:
        costs: how much work each layer is, by its path, in any unit.
        now: the time in seconds.
    """

    def __init__(
        self, costs: Mapping[str, float], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._costs = dict(costs)  # of what is left
        self._now = now
        self._began: float | None = None
        self._block = 0.0  # of work in the current block
        self._block_began = now()
        self._done = self._seconds = 0.0  # of whole blocks

    def begin(self) -> None:
        """Begin a block."""
        self._block, self._block_began = 0.0, self._now()
        if self._began is None:
            self._began = self._block_began

    def finish(self, names: Sequence[str]) -> None:
        """Note layers that are done."""
        if self._began is None:  # all blocks are calibrated at once, before
            self._began = self._block_began
        self._block += sum(self._costs.pop(name) for name in names)

    def finish_block(self) -> None:
        """Note that the block is done; one that an earlier run has made counts for nothing."""
        if not self._block:
            return
        self._done += self._block
        self._seconds += self._now() - self._block_began
        self._block, self._block_began = 0.0, self._now()

    def skip(self, names: Sequence[str]) -> bool:
        """Note layers that were done before; return whether all so far were."""
        for name in names:
            self._costs.pop(name)
        return self._began is None

    def left(self) -> float | None:
        """Return the seconds left; None before anything is done."""
        if self._began is None:
            return None
        in_block, left = self._now() - self._block_began, sum(self._costs.values())
        if not self._done:
            return in_block / self._block * left if self._block else None
        rate = self._seconds / self._done
        # what the block's layers took so far says nothing of what it takes between them
        return max(rate * (self._block + left) - in_block, 0.0)
