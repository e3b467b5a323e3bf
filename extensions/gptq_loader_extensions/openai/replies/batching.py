"""Generate the replies of many requests at a time, in the order they came."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_extensions.openai.errors import ApiError, to_api_error
from gptq_loader_extensions.openai.replies.engine import (
    Ended,
    EngineRequest,
    Failed,
    ReplyChunk,
    Run,
    Started,
)
from gptq_loader_extensions.openai.replies.scores import LogprobRecorder
from gptq_loader_plugin.errors import is_out_of_memory
from gptq_loader_plugin.system.memory import free_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_extensions.openai.replies.model_registry import ModelRegistry
    from gptq_loader_plugin.generation.batch import Batch
    from gptq_loader_plugin.generation.generate import Generation, Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["BatchEngine"]

KV_SHARE = 0.6  # of the memory that is free once a model is loaded, for keys and values
CACHE_SHARE = 0.25  # of that, for sequences that a next turn may continue

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RunningReply:
    """One reply of one request.

    Attributes:
        request: the request it belongs to.
        index: which of the request's replies it is.
        run: what to generate.
        kv_bytes: the memory its keys and values may take.
        recorder: records its tokens, where log-probabilities are requested.
    """

    request: EngineRequest
    index: int
    run: Run
    kv_bytes: int
    recorder: LogprobRecorder | None = None


class BatchEngine:
    """Many replies at a time: a request joins when it comes, and its replies leave as they end.

    Requests for another model wait until those that run have ended, and those behind them wait
    too: no request is overtaken for ever.

    Args:
        registry: loads models by name.
        max_queue: how many requests may wait.
        max_num_seqs: how many replies are generated at a time.
    """

    def __init__(self, registry: ModelRegistry, *, max_queue: int, max_num_seqs: int = 16) -> None:
        self._registry = registry
        self._max_queue = max_queue
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[EngineRequest] = deque()
        self._running: dict[EngineRequest, int] = {}  # how many of its replies have not ended
        self._closed = False
        self._changed = threading.Condition()
        # The rest belongs to the thread alone.
        self._prepared: deque[RunningReply] = deque()  # of requests that run, not begun yet
        self._replies: dict[Generation, RunningReply] = {}
        self._batch: tuple[LoadedModel, Batch] | None = None
        self._max_kv_bytes = 0
        self._thread = threading.Thread(target=self._serve, name="gptq-engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            ApiError: too many wait already, or the server is stopping.
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
            self._waiting.append(request)
            self._changed.notify_all()

    def cancel(self, request: EngineRequest) -> None:
        """Cancel a request: running, its replies end within a token; waiting, it fails."""
        request.cancel.set()
        with self._changed:
            if request not in self._waiting:
                return
            self._waiting.remove(request)
        request.send(Failed(_stopped()))

    def counts(self) -> tuple[int, int]:
        """Count the requests that run, and those that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def alive(self) -> bool:
        """Return whether the thread that generates replies still runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Accept no more requests, and end all there are within a token."""
        with self._changed:
            self._closed = True
            for request in (*self._waiting, *self._running):
                request.cancel.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, wait for the thread to end, and unload the model."""
        self.stop()
        self._thread.join()
        self._registry.unload()

    def _serve(self) -> None:
        was_idle = True
        while True:
            with self._changed:
                idle = not (self._waiting or self._running or self._closed)
            if idle and not was_idle:
                self._registry.release_memory()
            was_idle = idle
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
                if self._closed and not self._running:
                    break
            while (request := self._next()) is not None:
                self._prepare(request)
            self._begin()
            self._step()
        for request in self._waiting:
            request.send(Failed(_stopping()))

    def _next(self) -> EngineRequest | None:
        """Pop the first request that waits, where it can join those that run."""
        with self._changed:
            if self._closed or not self._waiting or self._prepared:
                return None
            if len(self._replies) >= self._max_num_seqs:
                return None
            loaded, first = self._registry.loaded, self._waiting[0]
            same_model = loaded is not None and first.model in (None, loaded[0])
            if self._running and (not same_model or first.exclusive is not None):
                return None
            request = self._waiting.popleft()
            self._running[request] = 0
            return request

    def _prepare(self, request: EngineRequest) -> None:
        """Load the model, and have the request say what to generate with it."""
        if request.cancel.is_set():
            return self._failed(request, _stopped())
        if request.exclusive is not None:
            return self._run_exclusive(request, request.exclusive)
        try:
            name, model = self._registry.load(request.model, cancelled=request.cancel.is_set)
            self._use(model)
            value, runs = request.prepare(model)
        except Exception as error:  # noqa: BLE001 - one request's fault must not end the others
            return self._failed(request, error)
        request.send(Started(name, value, runs))
        with self._changed:
            self._running[request] = len(runs)
        bytes_per_token = model.plan.kv_bytes_per_token or 0
        for index, run in enumerate(runs):
            length = min(len(run.ids) + run.options.max_new_tokens, model.context)
            self._prepared.append(RunningReply(request, index, run, length * bytes_per_token))
        return None if runs else self._ended(request)

    def _run_exclusive(self, request: EngineRequest, function: Callable[[], object]) -> None:
        """Call a function that loads or unloads models, or needs one to itself."""
        self._batch = None
        try:
            function()
        except Exception as error:  # noqa: BLE001 - one request's fault must not end the others
            return self._failed(request, error)
        return self._ended(request)

    def _use(self, model: LoadedModel) -> None:
        from gptq_loader_plugin.generation.batch import Batch

        if self._batch is not None and self._batch[0] is model:
            return
        self._batch = model, Batch(model)
        self._max_kv_bytes = int(_free_bytes(model) * KV_SHARE)
        bytes_per_sequence = model.context * (model.plan.kv_bytes_per_token or 0)
        kept = self._max_kv_bytes * CACHE_SHARE // max(1, bytes_per_sequence)
        model.keep(int(min(max(kept, 1), self._max_num_seqs)))

    def _begin(self) -> None:
        """Begin replies while there is memory; one is always begun, however long it may become."""
        while self._prepared:
            used = sum(reply.kv_bytes for reply in self._replies.values())
            if self._replies and (
                len(self._replies) >= self._max_num_seqs
                or used + self._prepared[0].kv_bytes > self._max_kv_bytes
            ):
                return
            reply = self._prepared.popleft()
            if reply.request not in self._running:  # it has failed meanwhile
                continue
            self._begin_one(reply)

    def _begin_one(self, reply: RunningReply) -> None:
        from gptq_loader_plugin.generation.generate import Piece

        assert self._batch is not None
        model, batch = self._batch
        run = reply.run
        if reply.request.cancel.is_set():  # and its prompt need not be read
            self._send(reply, Piece("", 0, "cancelled"))
            return
        if run.top_logprobs is not None:
            reply.recorder = LogprobRecorder(run.top_logprobs)
        try:
            generation = model.begin(
                run.ids,
                run.options,
                stop=run.stop,
                cancel=reply.request.cancel,
                processors=run.processors,
                watch=None if reply.recorder is None else reply.recorder.record,
            )
        except Exception as error:  # noqa: BLE001 - one request's fault must not end the others
            self._failed(reply.request, error)
            return
        self._replies[generation] = reply
        batch.add(generation)

    def _step(self) -> None:
        if self._batch is None:
            return
        for generation, result in self._batch[1].step():
            reply = self._replies[generation]
            if generation.finished or isinstance(result, Exception):
                del self._replies[generation]
            if reply.request not in self._running:  # another reply of it has failed
                continue
            if isinstance(result, Exception):
                self._failed(reply.request, result)
            elif result.finish == "cancelled" and self._closed:
                self._failed(reply.request, _stopping())
            else:
                self._send(reply, result)

    def _send(self, reply: RunningReply, piece: Piece) -> None:
        tokens = () if reply.recorder is None else reply.recorder.flush()
        reply.request.send(ReplyChunk(reply.index, piece, tokens))
        if piece.finish is None:
            return
        with self._changed:
            self._running[reply.request] -= 1
            unfinished = self._running[reply.request]
        if not unfinished:
            self._ended(reply.request)

    def _ended(self, request: EngineRequest) -> None:
        with self._changed:
            del self._running[request]
        request.send(Ended())

    def _failed(self, request: EngineRequest, error: Exception) -> None:
        request.cancel.set()  # its other replies end with it
        with self._changed:
            del self._running[request]
        if is_out_of_memory(error):
            self._registry.release_memory(caches=True)
        elif to_api_error(error).status == 500:
            logger.error("a request failed", exc_info=error)
        request.send(Failed(error))


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
