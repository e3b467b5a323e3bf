"""`gptq-loader serve --engine vllm`, as a person starts it in vLLM's environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from environments import python_of

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "sesame"
MINUTES = 10  # for one start, on a machine with other work
SECONDS = 60  # for the processes of a server to end


@dataclass
class VllmServer:
    """A server in a process of its own.

    Attributes:
        process: `gptq-loader serve`.
        told: what it said on stdout, as JSON.
        lines: what it wrote to stderr.
    """

    process: subprocess.Popen[str]
    told: dict[str, Any]
    lines: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """What it wrote to stderr."""
        return "".join(self.lines)

    def post(self, path: str, content: dict[str, Any], *, key: str | None = KEY) -> httpx.Response:
        """Send a request, with the right key unless another one is named."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.told['url']}{path}", json=content, headers=headers, timeout=300)

    def chat(self, content: str, **options: Any) -> dict[str, Any]:
        """Have it answer one message, greedily."""
        messages = [{"role": "user", "content": content}]
        request = {"model": self.told["model"], "messages": messages, "temperature": 0, **options}
        answer = self.post("/v1/chat/completions", request)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def stream(self, content: str, **options: Any) -> list[dict[str, Any]]:
        """Have it answer one message piece by piece."""
        request = {
            "model": self.told["model"],
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        answer = self.post("/v1/chat/completions", request)
        events = [it.removeprefix("data: ") for it in answer.text.splitlines() if it]
        assert events[-1] == "[DONE]"
        return [json.loads(it) for it in events[:-1]]

    def family(self) -> list[int]:
        """List the processes of vLLM's session that are alive: those of this process's child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [pid for child in children.split() for pid in processes_of_session(int(child))]


def processes_of_session(session: int) -> list[int]:
    """List the processes of a session that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until_gone(session: int) -> None:
    """Wait for the end of a session's last process."""
    deadline = time.monotonic() + SECONDS
    while processes_of_session(session) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of_session(session) == []


def start(*args: str | Path, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `gptq-loader serve` with these arguments, on a free port."""
    python = python_of("vllm")
    assert python is not None
    command = [python, "-P", "-m", "gptq_loader_plugin", "serve", *args, "--engine", "vllm"]
    return subprocess.Popen(
        [*map(str, command), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
            **(environ or {}),
        },
    )


@contextmanager
def serving(*args: str | Path, environ: dict[str, str] | None = None) -> Iterator[VllmServer]:
    """Serve until the block ends, or the test ends it itself."""
    process = start(*args, environ=environ)
    assert process.stdout is not None
    assert process.stderr is not None
    stderr, lines = process.stderr, []
    reader = threading.Thread(target=lambda: lines.extend(stderr))
    reader.start()
    clock = threading.Timer(60 * MINUTES, process.kill)
    clock.start()
    try:
        told = process.stdout.readline()
        clock.cancel()
        assert told, "".join(lines)
        yield VllmServer(process, json.loads(told), lines)
    finally:
        clock.cancel()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
        reader.join()
        process.stdout.close()
        stderr.close()
