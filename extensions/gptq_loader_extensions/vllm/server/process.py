"""Run vLLM's server in a process of its own: its log, its readiness, and its end."""

from __future__ import annotations

import http
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from gptq_loader_plugin.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

__all__ = ["ServerProcess", "find_reason", "strip_prefix"]

# The prefix of a message of vLLM's: "(EngineCore pid=7) INFO 11-25 17:14:19 [core.py:133] ".
PREFIX = re.compile(
    r"(?:\([^()]* ?pid=\d+\) )?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?)?"
)
RAISED = re.compile(r"(?:[A-Za-z_][\w.]*\.)?[A-Za-z_]\w*(?:Error|Exception): (?P<reason>.+)")
REFUSED = re.compile(r"\s*Value error, (?P<reason>.+?)(?: \[type=.*)?")
USAGE = re.compile(r"(?:vllm|usage).*?: error: (?P<reason>.+)")
# What vLLM logs in one process of an error in another.
NOT_THE_CAUSE = ("root cause", "initialization failed", "background process")
KEPT_LINES = 4000
LAST_SECONDS = 20.0  # for vLLM to end its processes, beyond what running replies get
POLL_SECONDS = 0.5


class ServerProcess:
    """vLLM's server, running.

    It has a session of its own, so that Ctrl-C reaches it once, by `stop`; and its standard input
    closes when this process exits, on which it exits too.

    Args:
        command: the command that runs it.
        environ: its environment.
        grace: the seconds that running replies get when it is stopped.
        verbose: whether to forward all of its output from the start.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], *, grace: float, verbose: bool
    ) -> None:
        self._grace = grace
        self._verbose = self._forwarding = verbose
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process = subprocess.Popen(  # noqa: S603 - our own Python
            command,
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.stop()

    def wait_ready(self, host: str, port: int, key: str | None) -> None:
        """Wait until it answers.

        Raises:
            PluginError: it exited instead; with the reason.
        """
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        while not _answers(host, port, headers):
            try:
                status = self._process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            raise self._exit_error(status, "vLLM did not start")

    def forward_output(self) -> None:
        """Write all of its output from now on to stderr."""
        self._forwarding = True

    def wait(self) -> None:
        """Wait until it exits.

        Raises:
            PluginError: it exited by itself; with the reason.
        """
        raise self._exit_error(self._process.wait(), "vLLM exited")

    def messages(self) -> list[str]:
        """Return its output, without the prefix of each of vLLM's messages."""
        return [strip_prefix(line) for line in list(self._lines)]

    def stop(self) -> None:
        """Stop it and every process of its session; running replies get a few seconds."""
        self._forwarding = self._verbose  # what it logs while it stops helps nobody
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._grace + LAST_SECONDS)
        with suppress(ProcessLookupError):  # none is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        """Keep its output, and forward what a user should see of it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            message = strip_prefix(line)
            if self._forwarding:
                sys.stderr.write(line)
            elif message.startswith("gptq_loader"):
                sys.stderr.write(f"{message}\n")
            sys.stderr.flush()

    def _exit_error(self, status: int, event: str) -> PluginError:
        self._reader.join(POLL_SECONDS)
        if status == -signal.SIGKILL:
            return PluginError(
                f"{event}: the system killed it, probably for lack of memory",
                hint="choose a smaller checkpoint, or a shorter context: --context 4096",
            )
        reason, hint = find_reason(self.messages())
        return PluginError(
            f"{event}: {reason or f'exit status {status}, without a reason'}",
            hint=hint or "see all of vLLM's output: gptq-loader --debug serve ...",
        )


def strip_prefix(line: str) -> str:
    """Remove the prefix of one of vLLM's messages."""
    text = line.rstrip("\n")
    match = PREFIX.match(text)
    return text[match.end() :] if match else text


def find_reason(messages: Iterable[str]) -> tuple[str, str]:
    """Find in vLLM's output why it exited: the reason, and a hint where one follows it."""
    reason = hint = ""
    for message in messages:
        if reason and message.startswith("hint: "):
            hint = message.removeprefix("hint: ")
            continue
        match = RAISED.fullmatch(message) or REFUSED.fullmatch(message) or USAGE.fullmatch(message)
        if match and not any(phrase in match["reason"] for phrase in NOT_THE_CAUSE):
            if match["reason"].removeprefix("gptq_loader: ") != reason:
                hint = ""
            reason = match["reason"].removeprefix("gptq_loader: ")
    return reason, hint


def _answers(host: str, port: int, headers: Mapping[str, str]) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=POLL_SECONDS * 4)
    try:
        connection.request("GET", "/health", headers=dict(headers))
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
