"""The server on Ray Serve as a person starts it, and clients that talk to it."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from environments import python_of
from processes import start_process, start_server

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from processes import ServerProcess

CLIENTS = Path(__file__).with_name("ray_clients.py")
KEY = "sk-for-the-tests"
START = 600  # seconds, on a machine with other work
END = 120


def processes_of(server: ServerProcess) -> list[psutil.Process]:
    """List every process of a server."""
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def replicas(server: ServerProcess) -> list[psutil.Process]:
    """List the replicas' processes."""
    return [it for it in processes_of(server) if "ServeReplica" in " ".join(it.cmdline())]


def load(server: ServerProcess, **job: Any) -> AbstractContextManager[subprocess.Popen[str]]:
    """Start clients; what each request came to is on their stdout, as JSON."""
    request = json.dumps({"key": KEY, "model": server.ready["model"], **job})
    return start_process(
        [str(python_of("ray")), str(CLIENTS), server.url, request],
        stderr=None,
        env={**os.environ, "PYTHONPATH": ""},
    )


def environ() -> dict[str, str]:
    """Give a user's environment."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GPTQ_LOADER_API_KEY": KEY, "PYTHONPATH": ""}


def command(model: str, *args: str) -> list[str]:
    """Write the command that serves on Ray."""
    python = str(python_of("ray"))
    serve = [python, "-m", "gptq_loader_plugin", "serve", model, "--engine", "ray"]
    return [*serve, "--port", "0", "--device", "cpu", "--json", *args]


@contextmanager
def serving(model: str, *args: str) -> Iterator[ServerProcess]:
    """Serve a checkpoint on Ray; afterwards nothing of it may be left."""
    with tempfile.TemporaryDirectory() as folder:  # where no source tree shadows what is installed
        serve = command(model, *args)
        with start_server(
            serve, seconds=START, sent=signal.SIGTERM, end=END, env=environ(), cwd=folder
        ) as server:
            yield server
