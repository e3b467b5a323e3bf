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

__all__ = ["ServerProcess", "find_reason", "message_of"]

# What vLLM writes before a message: "(EngineCore pid=7) INFO 11-25 17:14:19 [core.py:133] ".
HEAD = re.compile(
    r"(?:\([^()]* ?pid=\d+\) )?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?)?"
)
RAISED = re.compile(r"(?:[A-Za-z_][\w.]*\.)?[A-Za-z_]\w*(?:Error|Exception): (?P<reason>.+)")
REFUSED = re.compile(r"\s*Value error, (?P<reason>.+?)(?: \[type=.*)?")
USAGE = re.compile(r"(?:vllm|usage).*?: error: (?P<reason>.+)")
# What vLLM says in one process of what went wrong in another.
ELSEWHERE = ("root cause", "initialization failed", "background process")
KEPT_LINES = 4000
LAST_SECONDS = 20.0  # for vLLM to end its processes, beyond what running replies get
POLL_SECONDS = 0.5


class ServerProcess:
    """vLLM's server, running.

    It is in a session of its own, so that Ctrl-C reaches it once, by `stop`; and its standard input
    ends with this process, at which it ends itself.

    Args:
        command: what runs it.
        environ: its environment.
        grace: the seconds that running replies get when it is stopped.
        verbose: whether to pass on all that it writes from the start.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], *, grace: float, verbose: bool
    ) -> None:
        self._grace = grace
        self._verbose = self._passing = verbose
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
        """Give the process."""
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
            PluginError: it ended instead; says why.
        """
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        while not _answers(host, port, headers):
            try:
                status = self._process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            raise self._ended(status, "vLLM did not start")

    def pass_on(self) -> None:
        """Write all that it says from now on to stderr."""
        self._passing = True

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            PluginError: it ended by itself; says why.
        """
        raise self._ended(self._process.wait(), "vLLM ended")

    def messages(self) -> list[str]:
        """Give what it wrote, without what vLLM writes before each message."""
        return [message_of(it) for it in list(self._lines)]

    def stop(self) -> None:
        """End it and every process of its session; running replies get a few seconds."""
        self._passing = self._verbose  # what it says of its own end is for nobody
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._grace + LAST_SECONDS)
        with suppress(ProcessLookupError):  # which is as it should be
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        """Keep what it writes, and pass on what a user should see of it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            message = message_of(line)
            if self._passing:
                sys.stderr.write(line)
            elif message.startswith("gptq_loader"):
                sys.stderr.write(f"{message}\n")
            sys.stderr.flush()

    def _ended(self, status: int, what: str) -> PluginError:
        self._reader.join(POLL_SECONDS)
        if status == -signal.SIGKILL:
            return PluginError(
                f"{what}: the system ended it, mostly for want of memory",
                hint="choose a smaller checkpoint, or give less to its context: --context 4096",
            )
        reason, hint = find_reason(self.messages())
        return PluginError(
            f"{what}: {reason or f'it ended with {status} and gave no reason'}",
            hint=hint or "see all that vLLM wrote: gptq-loader --debug serve ...",
        )


def message_of(line: str) -> str:
    """Take off what vLLM writes before a message."""
    text = line.rstrip("\n")
    match = HEAD.match(text)
    return text[match.end() :] if match else text


def find_reason(messages: Iterable[str]) -> tuple[str, str]:
    """Find why vLLM ended in what it wrote: the reason, and a hint where one follows it."""
    reason = hint = ""
    for message in messages:
        if reason and message.startswith("hint: "):
            hint = message.removeprefix("hint: ")
            continue
        match = RAISED.fullmatch(message) or REFUSED.fullmatch(message) or USAGE.fullmatch(message)
        if match and not any(it in match["reason"] for it in ELSEWHERE):
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
