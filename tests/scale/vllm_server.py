"""Run `gptq-loader serve --engine vllm` in vLLM's environment, as a user does."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from environments import python_of
from processes import start_server
from waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import ServerProcess

KEY = "sesame"
MINUTES = 10  # for one start, on a machine with other work
ENVIRON = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def post(
    server: ServerProcess, path: str, content: dict[str, Any], *, key: str | None = KEY
) -> httpx.Response:
    """Send a request, with the right key unless another one is named."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}{path}", json=content, headers=headers, timeout=300)


def chat(server: ServerProcess, content: str, **options: Any) -> dict[str, Any]:
    """Have it answer one message, greedily."""
    messages = [{"role": "user", "content": content}]
    request = {"model": server.ready["model"], "messages": messages, "temperature": 0, **options}
    answer = post(server, "/v1/chat/completions", request)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def stream(server: ServerProcess, content: str, **options: Any) -> list[dict[str, Any]]:
    """Have it answer one message piece by piece."""
    request = {
        "model": server.ready["model"],
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    answer = post(server, "/v1/chat/completions", request)
    events = [it.removeprefix("data: ") for it in answer.text.splitlines() if it]
    assert events[-1] == "[DONE]"
    return [json.loads(it) for it in events[:-1]]


def family(server: ServerProcess) -> list[int]:
    """List the processes of vLLM's session that are alive: those of this process's child."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return [pid for child in children.split() for pid in processes_of_session(int(child))]


def processes_of_session(session: int) -> list[int]:
    """List the processes of a session that are alive."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state != "Z":
            alive.append(int(stat.parent.name))
    return alive


def wait_until_gone(session: int) -> None:
    """Wait for the end of a session's last process."""
    eventually(
        lambda: not processes_of_session(session),
        seconds=60,
        awaited=f"the end of session {session}",
    )


def command(*args: str | Path) -> list[str]:
    """Write the command that serves with these arguments, on a free port."""
    serve = [str(python_of("vllm")), "-P", "-m", "gptq_loader_plugin", "serve", *map(str, args)]
    return [*serve, "--engine", "vllm", "--port", "0", "--json"]


@contextmanager
def serving(*args: str | Path, environ: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Serve until the block ends, or the test ends it itself."""
    env = {**ENVIRON, **(environ or {})}
    with start_server(command(*args), seconds=60 * MINUTES, end=120, env=env) as server:
        yield server
