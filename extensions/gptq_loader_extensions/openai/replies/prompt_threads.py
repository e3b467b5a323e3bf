"""Prepare requests on threads of their own, so that no reply waits while a prompt is made."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.replies.prompt_tokenizer import PROMPT_THREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_extensions.openai.replies.engine import EngineRequest, Run
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["PromptThreads"]


class PromptThreads:
    """Some threads that prepare requests; the first takes small ones alone.

    Args:
        take: called with the number of a thread; waits for a request, and returns it with its
            model's name and its model, or None once there will be no more.
        prepared: called with a request, its model's name, and what it was prepared to.
        failed: called with a request that cannot be prepared, and why.
    """

    def __init__(
        self,
        take: Callable[[int], tuple[EngineRequest, str, LoadedModel] | None],
        prepared: Callable[[EngineRequest, str, tuple[Any, Sequence[Run]]], None],
        failed: Callable[[EngineRequest, Exception], None],
    ) -> None:
        self._take = take
        self._prepared = prepared
        self._failed = failed
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"gptq-prompts-{i}", daemon=True)
            for i in range(PROMPT_THREADS)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def alive(self) -> bool:
        """Return whether all of them run."""
        return all(thread.is_alive() for thread in self._threads)

    def join(self, seconds: float) -> None:
        """Wait for each to end, some seconds at most: a tokenizer cannot be stopped."""
        for thread in self._threads:
            thread.join(seconds)

    def _run(self, thread: int) -> None:
        while (taken := self._take(thread)) is not None:
            self._prepare(*taken)
            del taken  # and not kept while this waits for the next

    def _prepare(self, request: EngineRequest, name: str, model: LoadedModel) -> None:
        try:
            prepared = request.prepare(model)
        except Exception as error:  # noqa: BLE001 - one request's fault must not end the others
            self._failed(request, error)
        else:
            self._prepared(request, name, prepared)
