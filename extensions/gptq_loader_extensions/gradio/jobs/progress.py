"""Do long work beside a page, and say from moment to moment how far it has come."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Generic, TypeVar

from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gptq_loader_plugin.events import Progress

__all__ = ["Done", "progress_bar", "watched"]

T = TypeVar("T")
# The eye sees no more than about 10 steps of a bar a second; every redraw sends a message.
REDRAW_SECONDS = 0.1
STAGES = {
    "weights": "Loading the weights",
    "self-check": "Checking the kernels",
    "quantize": "Quantising",
    "branches": "Asking the hub",
    "download": "Downloading",
    "perplexity": "Measuring",
    "waiting": "Waiting",
}


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The work has ended.

    Attributes:
        value: what it gave.
        seconds: how long it took.
    """

    value: T
    seconds: float


def watched(work: Callable[[Callable[[Progress], None]], T]) -> Iterator[Progress | Done[T]]:
    """Do work on a thread of its own; give its progress, at most ten times a second, and its end.

    Where the one who watches goes away, the work goes on.

    Args:
        work: called with a function that it tells its progress.

    Raises:
        Exception: what the work raised.
    """
    told: queue.SimpleQueue[Progress | Done[T] | Exception] = queue.SimpleQueue()

    def run() -> None:
        began = time.monotonic()
        try:
            told.put(Done(work(told.put), time.monotonic() - began))
        except Exception as error:  # noqa: BLE001 - raised again where it is watched
            told.put(error)

    threading.Thread(target=run, name="gptq-page-work", daemon=True).start()
    drawn, stage = 0.0, ""
    while True:
        event = told.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Done):
            yield event
            return
        now = time.monotonic()
        if event.stage == stage and now - drawn < REDRAW_SECONDS:
            continue
        drawn, stage = now, event.stage
        yield event


def progress_bar(progress: Progress) -> str:
    """Draw how far work has come; one whose end is not known has no length."""
    stage = STAGES.get(progress.stage, progress.stage.capitalize())
    share = min(progress.done / progress.total, 1.0) if progress.total else None
    counted = ""
    if share is not None and progress.unit == "bytes":
        counted = f"{write_size(progress.done)} of {write_size(progress.total)}"
    elif share is not None:
        counted = f"{progress.done:,} of {progress.total:,} {progress.unit}"
    words = "" if share is None else f"{share:.0%}"
    value = "" if share is None else f' value="{share:.4f}"'
    return (
        f'<div class="working"><p><b>{escape(stage)}</b> <span>{words}</span> '
        f"<span>{escape(counted)}</span></p>"
        f'<progress max="1"{value} aria-label="{escape(stage)}"></progress>'
        f"<p class='detail'>{escape(progress.detail)}</p></div>"
    )
