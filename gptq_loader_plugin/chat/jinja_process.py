"""Render a chat template in a process of its own, which can be stopped: it is a checkpoint's code.

jinja's sandbox keeps a template from the machine, but not from running for ever or from taking all
memory. One process renders for all models of this one; where a template goes beyond a limit, it is
killed and the next one begins.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from gptq_loader_plugin.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MEMORY_BYTES", "RENDER_SECONDS", "StoppedTemplateError", "render_jinja"]

RENDER_SECONDS = 5.0  # of the processor's time
WAIT_SECONDS = 60.0  # where other programs have the processor
MEMORY_BYTES = 1 << 29
POLL_SECONDS = 0.05
WORKER = Path(__file__).with_name("jinja_worker.py")
# Its imports are those of this process, and its own folder, where our files have other programs'
# names, is none of them.
START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.stdin.readline()); "
    f"runpy.run_path({str(WORKER)!r}, run_name='__main__')"
)
CHOOSE = 'choose another template: template="chatml"'


class StoppedTemplateError(TemplateError):
    """A template went beyond a limit of time or memory."""


class _Stopped(Exception):
    """The process ended, or was ended; says why."""


class _Worker:
    """The process, and what it answers."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._process = subprocess.Popen(  # noqa: S603 - our own Python, our own file
            [sys.executable, "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for this process, which ends that one
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._write(json.dumps(sys.path))

    def ask(self, request: str, seconds: float) -> dict[str, Any]:
        """Have one template rendered.

        Raises:
            _Stopped: it took more than there is.
        """
        watched = psutil.Process(self._process.pid)
        begun, ends = _processor_seconds(watched), time.monotonic() + WAIT_SECONDS
        self._write(request)
        while True:
            try:
                line = self._answers.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if _processor_seconds(watched) - begun > seconds or time.monotonic() > ends:
                    raise _Stopped(f"it was still running after {seconds:g} seconds") from None
                if _memory(watched) > MEMORY_BYTES:
                    raise _Stopped("it takes too much memory") from None
                continue
            if not line:
                raise _Stopped("it takes too much memory")  # what else ends it
            answer: dict[str, Any] = json.loads(line)
            return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer is that it has ended
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, contextlib.suppress(ValueError):
            for line in lines:
                self._answers.put(line)
        self._answers.put("")


_lock = threading.Lock()
_worker: _Worker | None = None


def render_jinja(
    template: str, variables: Mapping[str, Any], *, source: str, seconds: float = RENDER_SECONDS
) -> str:
    """Render a chat template as transformers does, within limits of time and memory.

    Args:
        template: the jinja source.
        variables: what it may name, as JSON has it: `messages`, `bos_token` and such.
        source: where it came from, for people.
        seconds: the time it may take.

    Raises:
        TemplateError: it is broken, refuses these messages, or goes beyond a limit.
    """
    global _worker  # noqa: PLW0603 - one process for all
    request = json.dumps([template, dict(variables)])
    with _lock:
        if _worker is None or _worker.owner != os.getpid():  # a fork has its own
            _worker = _Worker()
        try:
            answer = _worker.ask(request, seconds)
        except _Stopped as error:
            _close()
            raise StoppedTemplateError(
                f"the chat template of {source} cannot be used: {error}", hint=CHOOSE
            ) from error
        except BaseException:  # its answer would be taken for the next one's
            _close()
            raise
    if "text" in answer:
        text: str = answer["text"]
        return text
    if "line" in answer:
        raise TemplateError(
            f"the chat template of {source} is broken in line {answer['line']}: {answer['error']}",
            hint=f"repair it, or {CHOOSE}",
        )
    raise TemplateError(
        f"the chat template of {source} does not take these messages: {answer['error']}",
        hint=f"leave out the system message, or alternate user and assistant; or {CHOOSE}",
    )


def _close() -> None:
    """End the process, where this one has started it."""
    global _worker
    worker, _worker = _worker, None
    if worker is not None and worker.owner == os.getpid():
        worker.close()


def _processor_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


atexit.register(_close)
