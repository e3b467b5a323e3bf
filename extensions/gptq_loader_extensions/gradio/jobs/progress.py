"""Run long work on a thread of its own, and show its progress."""

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

__all__ = ["REDRAW_SECONDS", "Finished", "progress_bar", "run_with_progress"]

T = TypeVar("T")
# The eye sees no more than about 10 steps of a bar a second; every redraw sends a message.
REDRAW_SECONDS = 0.1
STAGES = {
    "checkpoint": "Reading the checkpoint",
    "torch": "Starting torch, and building the model",
    "weights": "Loading the weights",
    "self-check": "Checking the kernels",
    "quantize": "Quantising",
    "branches": "Asking the hub",
    "download": "Downloading",
    "perplexity": "Measuring",
    "compare": "Measuring",
    "speed": "Timing a prompt and a reply",
    "waiting": "Waiting",
}


@dataclass(frozen=True, slots=True)
class Finished(Generic[T]):
    """The work has ended.

    Attributes:
        value: what it returned.
        seconds: how long it took.
    """

    value: T
    seconds: float


def run_with_progress(
    work: Callable[[Callable[[Progress], None]], T],
) -> Iterator[Progress | Finished[T]]:
    """Run work on a thread of its own; yield its progress, at most ten times a second, and its end.

    The work goes on when nobody iterates any more.

    Args:
        work: called with a function that takes its progress.

    Raises:
        Exception: what the work raised.
    """
    events: queue.SimpleQueue[Progress | Finished[T] | Exception] = queue.SimpleQueue()

    def run() -> None:
        began = time.monotonic()
        try:
            events.put(Finished(work(events.put), time.monotonic() - began))
        except Exception as error:  # noqa: BLE001 - raised again by the iterator
            events.put(error)

    threading.Thread(target=run, name="gptq-page-work", daemon=True).start()
    shown, stage = 0.0, ""
    while True:
        event = events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Finished):
            yield event
            return
        now = time.monotonic()
        if event.stage == stage and now - shown < REDRAW_SECONDS:
            continue
        shown, stage = now, event.stage
        yield event


def progress_bar(progress: Progress, *, speed: float | None = None) -> str:
    """Draw a progress bar; without a length where the end is not known.

    Args:
        progress: how far it has come.
        speed: how much of it comes in a second, where that is known.
    """
    stage = STAGES.get(progress.stage, progress.stage.capitalize())
    share = min(progress.done / progress.total, 1.0) if progress.total else None
    amount = ""
    if share is not None and progress.unit == "bytes":
        amount = f"{write_size(progress.done)} of {write_size(progress.total)}"
    elif share is not None:
        amount = f"{progress.done:,} of {progress.total:,} {progress.unit}"
    if share is not None and speed:
        amount += f", {write_size(int(speed))}/s"
        amount += f", {write_duration((progress.total - progress.done) / speed)} left"
    percent = "" if share is None else f"{share:.0%}"
    value = "" if share is None else f' value="{share:.4f}"'
    return (
        f'<div class="working"><p><b>{escape(stage)}</b> <span>{percent}</span> '
        f"<span>{escape(amount)}</span></p>"
        f'<progress max="1"{value} aria-label="{escape(stage)}"></progress>'
        f"<p class='detail'>{escape(progress.detail)}</p></div>"
    )


def write_duration(seconds: float) -> str:
    """Write a time in the two largest units that it has."""
    minutes, rest = divmod(max(round(seconds), 1), 60)
    if not minutes:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"
