"""Write the replies of many requests side by side, in the order they came."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_extensions.openai.errors import ApiError, as_api_error
from gptq_loader_extensions.openai.replies.engine import Ended, Failed, Ready, ReplyChunk, Run, Work
from gptq_loader_extensions.openai.replies.scores import Scores
from gptq_loader_plugin.errors import is_out_of_memory
from gptq_loader_plugin.system.memory import free_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_extensions.openai.replies.model_registry import ModelRegistry
    from gptq_loader_plugin.generation.batch import Batch
    from gptq_loader_plugin.generation.generate import Generation, Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["BatchEngine"]

SHARE = 0.6  # of the memory that is free once a model is loaded, for keys and values
KEPT_SHARE = 0.25  # of that, for sequences that a next turn may go on with

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """One reply of one request.

    Attributes:
        work: whose it is.
        index: which of its replies.
        run: what to write.
        size: the bytes its keys and values may take.
        scores: takes down its tokens, where that was asked for.
    """

    work: Work
    index: int
    run: Run
    size: int
    scores: Scores | None = None


class BatchEngine:
    """Many replies at a time: a request joins when it comes, and its replies leave as they end.

    Requests for another model wait until those that run have ended, and those behind them wait too:
    nobody is overtaken for ever.

    Args:
        registry: gives models by name.
        max_queue: how many works may wait.
        most: how many replies are written at a time.
    """

    def __init__(self, registry: ModelRegistry, *, max_queue: int, most: int = 16) -> None:
        self._registry = registry
        self._max_queue = max_queue
        self._most = most
        self._waiting: deque[Work] = deque()
        self._running: dict[Work, int] = {}  # how many of its replies have not ended
        self._closed = False
        self._changed = threading.Condition()
        # The rest is the thread's alone.
        self._ready: deque[Job] = deque()  # their requests run, and they will
        self._jobs: dict[Generation, Job] = {}
        self._batch: tuple[LoadedModel, Batch] | None = None
        self._room = 0  # bytes for keys and values
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
        """End work: running, its replies end within a token; waiting, it fails."""
        work.cancel.set()
        with self._changed:
            if work not in self._waiting:
                return
            self._waiting.remove(work)
        work.send(Failed(_stopped()))

    def counts(self) -> tuple[int, int]:
        """Count the works that run, and those that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def alive(self) -> bool:
        """Whether replies are still written."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Take no more work, and end all there is within a token."""
        with self._changed:
            self._closed = True
            for work in (*self._waiting, *self._running):
                work.cancel.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, wait for the thread to end, and close the model."""
        self.stop()
        self._thread.join()
        self._registry.unload()

    def _serve(self) -> None:
        idle = True
        while True:
            with self._changed:
                resting = not (self._waiting or self._running or self._closed)
            if resting and not idle:
                self._registry.release_memory()
            idle = resting
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
                if self._closed and not self._running:
                    break
            while (work := self._next()) is not None:
                self._prepare(work)
            self._begin()
            self._step()
        for work in self._waiting:
            work.send(Failed(_stopping()))

    def _next(self) -> Work | None:
        """Take the first work that waits, where it can join those that run."""
        with self._changed:
            if self._closed or not self._waiting or self._ready:
                return None
            if len(self._jobs) >= self._most:
                return None
            loaded, wanted = self._registry.loaded, self._waiting[0].model
            same = loaded is not None and wanted in (None, loaded[0])
            same = same and self._waiting[0].alone is None
            if self._running and not same:
                return None
            work = self._waiting.popleft()
            self._running[work] = 0
            return work

    def _prepare(self, work: Work) -> None:
        """Have the model there, and what the work wants written."""
        if work.cancel.is_set():
            return self._failed(work, _stopped())
        if work.alone is not None:
            return self._do_alone(work, work.alone)
        try:
            name, model = self._registry.load(work.model, cancelled=work.cancel.is_set)
            self._use(model)
            value, runs = work.prepare(model)
        except Exception as error:  # noqa: BLE001 - one request's fault must not end the others
            return self._failed(work, error)
        work.send(Ready(name, value, runs))
        with self._changed:
            self._running[work] = len(runs)
        each = model.plan.kv_bytes_per_token or 0
        for index, run in enumerate(runs):
            length = min(len(run.ids) + run.options.max_new_tokens, model.context)
            self._ready.append(Job(work, index, run, length * each))
        return None if runs else self._ended(work)

    def _do_alone(self, work: Work, act: Callable[[], object]) -> None:
        """Do what needs the models to itself: exchange them, or let one go."""
        self._batch = None
        try:
            act()
        except Exception as error:  # noqa: BLE001 - one request's fault must not end the others
            return self._failed(work, error)
        return self._ended(work)

    def _use(self, model: LoadedModel) -> None:
        from gptq_loader_plugin.generation.batch import Batch

        if self._batch is not None and self._batch[0] is model:
            return
        self._batch = model, Batch(model)
        self._room = int(_free_bytes(model) * SHARE)
        most = (
            self._room * KEPT_SHARE // max(1, model.context * (model.plan.kv_bytes_per_token or 0))
        )
        model.keep(int(min(max(most, 1), self._most)))

    def _begin(self) -> None:
        """Begin replies while there is room: one is always begun, however long it may become."""
        while self._ready:
            used = sum(it.size for it in self._jobs.values())
            if self._jobs and (
                len(self._jobs) >= self._most or used + self._ready[0].size > self._room
            ):
                return
            job = self._ready.popleft()
            if job.work not in self._running:  # it has failed meanwhile
                continue
            self._begin_one(job)

    def _begin_one(self, job: Job) -> None:
        from gptq_loader_plugin.generation.generate import Piece

        assert self._batch is not None
        model, batch = self._batch
        if job.work.cancel.is_set():  # and its prompt need not be read
            self._said(job, Piece("", 0, "cancelled"))
            return
        run, job.scores = job.run, None if job.run.top is None else Scores(job.run.top)
        try:
            generation = model.begin(
                run.ids,
                run.options,
                stop=run.stop,
                cancel=job.work.cancel,
                processors=run.processors,
                watch=None if job.scores is None else job.scores.watch,
            )
        except Exception as error:  # noqa: BLE001 - one request's fault must not end the others
            self._failed(job.work, error)
            return
        self._jobs[generation] = job
        batch.add(generation)

    def _step(self) -> None:
        if self._batch is None:
            return
        for generation, what in self._batch[1].step():
            job = self._jobs[generation]
            if generation.finished or isinstance(what, Exception):
                del self._jobs[generation]
            if job.work not in self._running:  # another reply of it has failed
                continue
            if isinstance(what, Exception):
                self._failed(job.work, what)
            elif what.finish == "cancelled" and self._closed:
                self._failed(job.work, _stopping())
            else:
                self._said(job, what)

    def _said(self, job: Job, piece: Piece) -> None:
        job.work.send(
            ReplyChunk(job.index, piece, () if job.scores is None else job.scores.taken())
        )
        if piece.finish is None:
            return
        with self._changed:
            self._running[job.work] -= 1
            left = self._running[job.work]
        if not left:
            self._ended(job.work)

    def _ended(self, work: Work) -> None:
        with self._changed:
            del self._running[work]
        work.send(Ended())

    def _failed(self, work: Work, error: Exception) -> None:
        work.cancel.set()  # its other replies end with it
        with self._changed:
            del self._running[work]
        if is_out_of_memory(error):
            self._registry.release_memory(caches=True)
        elif as_api_error(error).status == 500:
            logger.error("a request failed", exc_info=error)
        work.send(Failed(error))


def _free_bytes(model: LoadedModel) -> int:
    """Count the memory that is free where a model's keys and values will be."""
    if model.model.device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(model.model.device)[0])
    return free_memory()


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping")


def _stopped() -> ApiError:
    return ApiError(503, "stopped before it began", kind="server_error", code="stopped")
