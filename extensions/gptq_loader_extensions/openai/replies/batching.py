"""Generate the replies of many requests at a time, in the order they came.

One thread runs the model, and nothing else that takes long: others make the prompts.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import ApiError, to_api_error
from gptq_loader_extensions.openai.replies.engine import (
    Ended,
    EngineRequest,
    Failed,
    ReplyChunk,
    Run,
    Started,
)
from gptq_loader_extensions.openai.replies.kv_budget import reserve_kv_cache
from gptq_loader_extensions.openai.replies.prompt_threads import PromptThreads
from gptq_loader_extensions.openai.replies.scores import LogprobRecorder
from gptq_loader_extensions.openai.replies.waiting import WaitingRequests
from gptq_loader_plugin.errors import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_extensions.openai.replies.model_registry import ModelRegistry
    from gptq_loader_plugin.generation.batch import Batch
    from gptq_loader_plugin.generation.generate import Generation, Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["BatchEngine"]

END_SECONDS = 1.0  # for what is being prepared to end when the server stops

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


@dataclass(slots=True)
class PreparedRequest:
    """A request that begins.

    Attributes:
        request: the request.
        content: its value and its replies; None where it has not been prepared.
        computing: what needs the model before the replies do.
    """

    request: EngineRequest
    content: tuple[Any, Sequence[Run]] | None
    computing: Iterator[object] | None = None


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
        self._max_num_seqs = max_num_seqs
        self._waiting = WaitingRequests(max_queue)
        self._running: dict[EngineRequest, int] = {}  # how many of its replies have not ended
        self._switching = False  # to another model, or to none
        self._closed = False
        self._changed = threading.Condition()
        # The rest belongs to the engine's thread alone.
        self._computing: deque[PreparedRequest] = deque()
        self._prepared: deque[RunningReply] = deque()  # of requests that run, not begun yet
        self._replies: dict[Generation, RunningReply] = {}
        self._batch: tuple[LoadedModel, Batch] | None = None
        self._max_kv_bytes = 0
        self._thread = threading.Thread(target=self._serve, name="gptq-engine", daemon=True)
        self._thread.start()
        self._prompts = PromptThreads(
            self._take_unprepared, self._set_prepared, self._cannot_prepare
        )
        self._prompts.start()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            ApiError: too many wait already, or the server is stopping.
        """
        with self._changed:
            if self._closed:
                raise _stopping()
            self._waiting.add(request)
            self._changed.notify_all()

    def cancel(self, request: EngineRequest) -> None:
        """Cancel a request: running, its replies end within a token; waiting, it fails.

        One that is being prepared leaves its place to the next; nobody sees what it is prepared to.
        """
        request.cancel.set()
        if self._remove(request):
            request.send(Failed(_stopped()))

    def counts(self) -> tuple[int, int]:
        """Count the requests that run, and those that wait or are prepared."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def alive(self) -> bool:
        """Return whether the threads that generate replies and make prompts still run."""
        return self._thread.is_alive() and self._prompts.alive()

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
        self._prompts.join(END_SECONDS)
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
                self._changed.wait_for(lambda: self._next() or self._running or self._closed)
                if self._closed and not self._running:
                    break
            while (prepared := self._pop_next()) is not None:
                self._start(prepared)
                self._end_switching()
            self._compute()
            self._begin()
            self._step()
        for request in self._waiting:
            request.send(Failed(_stopping()))

    def _next(self) -> EngineRequest | None:
        """Return the first request that waits and can join those that run."""
        if self._closed or self._prepared or len(self._replies) >= self._max_num_seqs:
            return None
        return self._waiting.next_to_begin(self._loaded_name(), running=bool(self._running))

    def _pop_next(self) -> PreparedRequest | None:
        with self._changed:
            request = self._next()
            if request is None:
                return None
            self._running[request] = 0
            prepared = PreparedRequest(request, self._waiting.pop(request))
            self._switching = prepared.content is None
            self._changed.notify_all()
            return prepared

    def _end_switching(self) -> None:
        with self._changed:
            self._switching = False
            self._changed.notify_all()

    def _loaded_name(self) -> str | None:
        loaded = self._registry.loaded
        return None if loaded is None else loaded[0]

    def _start(self, prepared: PreparedRequest) -> None:
        """Begin a request that is prepared, or load the model that it is to be prepared with."""
        request = prepared.request
        if request.cancel.is_set():
            return self._failed(request, _stopped())
        if request.exclusive is not None:
            return self._run_exclusive(request, request.exclusive)
        try:
            name, model = self._registry.load(request.model, cancelled=request.cancel.is_set)
            self._use(model)
        except Exception as error:  # noqa: BLE001 - one request's fault must not end the others
            return self._failed(request, error)
        if prepared.content is None:
            return self._put_back(request)
        value, runs = prepared.content
        if request.compute is not None:
            prepared.computing = request.compute(model, value)
            self._computing.append(prepared)
            return None
        return self._begin_all(request, name, value, runs)

    def _put_back(self, request: EngineRequest) -> None:
        """Have a request prepared, now that its model is loaded."""
        with self._changed:
            del self._running[request]
            self._waiting.add_first(request)
        if request.cancel.is_set():  # while it was loaded, and `cancel` did not see it waiting
            self.cancel(request)

    def _compute(self) -> None:
        """Take one step of what a request needs the model for before its replies."""
        if not self._computing:
            return
        prepared = self._computing[0]
        request, content = prepared.request, prepared.content
        assert prepared.computing is not None
        assert content is not None
        error: Exception | None = _stopped() if request.cancel.is_set() else None
        ended = False
        try:
            ended = error is None and next(prepared.computing, prepared) is prepared
        except Exception as fault:  # noqa: BLE001 - one request's fault must not end the others
            error = fault
        if error is not None or ended:
            self._computing.popleft()
        if error is not None:
            self._failed(request, error)
        elif ended:
            self._begin_all(request, self._loaded_name() or "", *content)

    def _begin_all(
        self, request: EngineRequest, name: str, value: object, runs: Sequence[Run]
    ) -> None:
        """Queue the replies of a request."""
        assert self._batch is not None
        model = self._batch[0]
        request.send(Started(name, value, runs))
        with self._changed:
            self._running[request] = len(runs)
        bytes_per_token = model.plan.kv_bytes_per_token or 0
        for index, run in enumerate(runs):
            length = min(len(run.ids) + run.options.max_new_tokens, model.context)
            self._prepared.append(RunningReply(request, index, run, length * bytes_per_token))
        if not runs:
            self._ended(request)

    def _take_unprepared(self, thread: int) -> tuple[EngineRequest, str, LoadedModel] | None:
        """Wait for a request to prepare; return it with its model, or None once all has ended.

        Args:
            thread: which one waits; the first takes small requests alone.
        """
        with self._changed:
            while not self._closed:
                prompts = self._registry.prompt_models
                request = self._waiting.next_to_prepare(
                    None if prompts is None else prompts[0],
                    switching=self._switching,
                    small=thread == 0,
                )
                if request is not None and prompts is not None:
                    return request, prompts[0], prompts[1][thread]
                self._changed.wait()
        return None

    def _cannot_prepare(self, request: EngineRequest, error: Exception) -> None:
        """End a request that cannot be prepared, at once."""
        if self._remove(request):
            self._report(error)
            request.send(Failed(error))

    def _set_prepared(
        self, request: EngineRequest, name: str, prepared: tuple[Any, Sequence[Run]]
    ) -> None:
        """Keep what a request was prepared to until its turn, or answer it where that is all."""
        if request.at_once:
            if self._remove(request):
                request.send(Started(name, *prepared))
                request.send(Ended())
            return
        with self._changed:
            self._waiting.set_prepared(request, prepared)
            self._changed.notify_all()

    def _remove(self, request: EngineRequest) -> bool:
        """Remove a request from those that wait; return whether it was among them."""
        with self._changed:
            self._changed.notify_all()
            return self._waiting.remove(request)

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
        self._max_kv_bytes = reserve_kv_cache(model, self._max_num_seqs)

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
                shown=run.shown,
                adapter=run.adapter,
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
            self._changed.notify_all()
        request.send(Ended())

    def _failed(self, request: EngineRequest, error: Exception) -> None:
        request.cancel.set()  # its other replies end with it
        with self._changed:
            del self._running[request]
            self._changed.notify_all()
        if is_out_of_memory(error):
            self._registry.release_memory(caches=True)
        self._report(error)
        request.send(Failed(error))

    def _report(self, error: Exception) -> None:
        """Log what is no client's fault."""
        if not is_out_of_memory(error) and to_api_error(error).status == 500:
            logger.error("a request failed", exc_info=error)


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping")


def _stopped() -> ApiError:
    return ApiError(503, "stopped before it began", kind="server_error", code="stopped")
