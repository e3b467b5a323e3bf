"""Run blocking jobs on a few threads, watched by a caller who can be interrupted at any moment.

A read from a slow network blocks for seconds, and nobody who presses Ctrl-C waits that long. So
jobs block on threads of their own, and the caller's thread does nothing but look at them.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Cancelled", "Stop", "run_jobs"]

POLL_SECONDS = 0.02  # seconds between two looks: a cancel must be heard within a tenth of a second
JOIN_SECONDS = 0.03  # seconds that threads are given to let go of their locks once they are stopped

Result = TypeVar("Result")


class Cancelled(Exception):
    """The caller, or an error in another job, has ended this one."""


class Stop:
    """Tells jobs that nobody waits for them any more, and wakes those that read a connection."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[int] = set()

    def is_set(self) -> bool:
        """Return whether jobs are to end."""
        return self._event.is_set()

    def check(self) -> None:
        """Do nothing, or raise `Cancelled` once stopped."""
        if self._event.is_set():
            raise Cancelled

    def sleep(self, seconds: float) -> None:
        """Wait; raise `Cancelled` as soon as stopped."""
        self._event.wait(seconds)
        self.check()

    def set(self) -> None:
        """Stop every job."""
        with self._lock:
            self._event.set()
            for file in self._sockets:
                # a copy of the file: the one in use may be wrapped in TLS, and is the reader's
                with suppress(OSError), socket.socket(fileno=os.dup(file)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def reading(self, response: Any) -> Iterator[None]:  # noqa: ANN401 - httpx's or httpx2's
        """End the reading of this response's body, inside, as soon as stopped."""
        stream = response.extensions.get("network_stream")
        connection = stream.get_extra_info("socket") if stream else None
        file = connection.fileno() if connection is not None else -1
        with self._lock:
            self.check()
            if file >= 0:
                self._sockets.add(file)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(file)


def run_jobs(
    jobs: Sequence[Callable[[Stop], Result]],
    *,
    workers: int,
    cancelled: Callable[[], bool] | None = None,
    on_poll: Callable[[], None] | None = None,
    limit: float | None = None,
) -> list[Result]:
    """Run jobs on threads and give their results in order; the first error ends them all.

    Args:
        jobs: each is given a `Stop` to look at.
        workers: the most threads.
        cancelled: asked again and again; once it says yes, `Cancelled` is raised.
        on_poll: called on this thread again and again, while jobs run and once after them.
        limit: the most seconds they may take together.

    Raises:
        Cancelled: `cancelled` said yes.
        TimeoutError: the limit was reached.
    """
    stop = Stop()
    pool = _Pool(jobs, stop)
    until = None if limit is None else time.monotonic() + limit
    try:
        pool.start(workers)
        while not pool.done():
            if cancelled is not None and cancelled():
                raise Cancelled
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"no answer in {limit:.0f} seconds")
            if on_poll is not None:
                on_poll()
            pool.collect(POLL_SECONDS)
    finally:
        stop.set()
        pool.join()
    if on_poll is not None:
        on_poll()
    return pool.results()


class _Pool(Generic[Result]):
    """Threads that take one job after another, and what came of them."""

    def __init__(self, jobs: Sequence[Callable[[Stop], Result]], stop: Stop) -> None:
        self._jobs = jobs
        self._stop = stop
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._results: dict[int, Result] = {}
        self._threads: list[threading.Thread] = []

    def start(self, workers: int) -> None:
        for number in range(len(self._jobs)):
            self._waiting.put(number)
        for number in range(min(workers, len(self._jobs))):
            # a daemon: a process that ends does not wait for the network either
            thread = threading.Thread(target=self._work, name=f"hub {number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def done(self) -> bool:
        return len(self._results) == len(self._jobs)

    def collect(self, seconds: float) -> None:
        """Wait for the next job to end, and raise its error."""
        try:
            number, result, error = self._ended.get(timeout=seconds)
        except queue.Empty:
            return
        if error is not None:
            raise error
        self._results[number] = result

    def join(self) -> None:
        """Give the threads a moment to release their locks."""
        until = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def results(self) -> list[Result]:
        return [self._results[number] for number in range(len(self._jobs))]

    def _work(self) -> None:
        while True:
            try:
                number = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._stop.check()
                self._ended.put((number, self._jobs[number](self._stop), None))
            except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
                self._ended.put((number, None, error))
