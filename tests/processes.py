"""Start processes, read what they write and end them, each within a deadline."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from waiting import join

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ServerProcess", "read_line", "run_process", "start_process", "start_server"]

RUN = 300  # seconds for a command, on a machine with other work
START = 120  # for a process to write its first line
END = 60  # for one to end that was told to


def run_process(
    command: Sequence[object], *, check: bool = False, seconds: float = RUN, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and capture what it writes; with `check`, it must succeed."""
    options = {"capture_output": True, "text": True, **options}
    completed: subprocess.CompletedProcess[str] = subprocess.run(
        [str(part) for part in command], check=False, timeout=seconds, **options
    )
    assert not check or completed.returncode == 0, completed.stderr
    return completed


@contextmanager
def start_process(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a command with pipes from its output; kill it if it outlives the block."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    process = subprocess.Popen([str(part) for part in command], **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=END)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def read_line(
    process: subprocess.Popen[str],
    seconds: float = START,
    *,
    source: Literal["stdout", "stderr"] = "stdout",
) -> str:
    """Read a line of what a process writes; kill the process if none comes in time."""
    stream = getattr(process, source)
    deadline = threading.Timer(seconds, process.kill)
    deadline.start()
    try:
        line: str = stream.readline()
    finally:
        deadline.cancel()
    return line


@dataclass
class ServerProcess:
    """A server in a process of its own.

    Attributes:
        process: the one that was started.
        ready: what it wrote to stdout when it was ready, as JSON.
        lines: what it has written to stderr.
    """

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it listens."""
        return str(self.ready["url"])

    @property
    def log(self) -> str:
        """What it has written to stderr."""
        return "".join(self.lines)

    def requests(self) -> list[dict[str, Any]]:
        """List what it has logged of each request."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]


@contextmanager
def start_server(
    command: Sequence[object],
    *,
    seconds: float = START,
    sent: signal.Signals = signal.SIGINT,
    end: float = END,
    **options: Any,
) -> Iterator[ServerProcess]:
    """Start a server that writes a line of JSON to stdout when it is ready; end it by a signal.

    Args:
        command: what to start.
        seconds: how long the start may take.
        sent: the signal that ends it after the block, unless it has ended by then.
        end: how long that may take.
        **options: of the process.
    """
    with start_process(command, **options) as process:
        assert process.stderr is not None
        stderr, lines = process.stderr, list[str]()
        reader = threading.Thread(target=lambda: lines.extend(stderr), name="stderr's reader")
        reader.start()
        try:
            ready = read_line(process, seconds)
            if not ready:
                process.kill()
                join(reader)
            assert ready, "".join(lines)
            yield ServerProcess(process, json.loads(ready), lines)
        finally:
            try:
                if process.poll() is None:
                    process.send_signal(sent)
                process.wait(timeout=end)
            finally:
                process.kill()
                join(reader)
