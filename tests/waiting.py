"""Wait for what a test needs, up to a deadline, and fail with its name when it does not come."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

__all__ = ["eventually", "join"]

PAUSES = 0.005, 0.05  # seconds between two questions: the first ones, and the longest
Value = TypeVar("Value")


def eventually(
    condition: Callable[[], Value],
    seconds: float = 30,
    *,
    awaited: str,
    log: Callable[[], str] | None = None,
) -> Value:
    """Ask again and again until the answer is true, and return it; fail at the deadline.

    Args:
        condition: what to ask; an error that it raises ends the wait.
        seconds: how long to go on asking.
        awaited: what is awaited, for the failure's message.
        log: what else to show there.
    """
    __tracebackhide__ = True
    end = time.monotonic() + seconds
    pause, longest = PAUSES
    while not (value := condition()):
        if time.monotonic() > end:
            shown = f"\n{log()}" if log else ""
            pytest.fail(f"waited {seconds:g} s in vain for {awaited}{shown}")
        time.sleep(pause)
        pause = min(1.5 * pause, longest)
    return value


def join(*threads: threading.Thread, seconds: float = 60) -> None:
    """Wait for the end of threads; fail where one is still running at the deadline."""
    eventually(
        lambda: not any(thread.is_alive() for thread in threads),
        seconds,
        awaited="the end of " + ", ".join(thread.name for thread in threads),
    )
