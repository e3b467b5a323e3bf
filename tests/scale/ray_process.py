"""The server on Ray Serve as a person starts it, and clients that talk to it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from environments import python_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["END", "KEY", "START", "RayProcess", "command", "environ", "serving"]

CLIENTS = Path(__file__).with_name("ray_clients.py")
KEY = "sk-for-the-tests"
START = 600  # seconds, on a machine with other work
END = 120


@dataclass
class RayProcess:
    """A server on Ray that runs in processes of its own.

    Attributes:
        process: the one that was started.
        told: what it said on stdout.
        lines: what it wrote to stderr.
    """

    process: psutil.Popen
    told: dict[str, Any]
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        url: str = self.told["url"]
        return url

    def all(self) -> list[psutil.Process]:
        """List every process that was started."""
        return [self.process, *self.process.children(recursive=True)]

    def replicas(self) -> list[psutil.Process]:
        """List the replicas' processes."""
        found = self.process.children(recursive=True)
        return [it for it in found if "ServeReplica" in " ".join(it.cmdline())]

    def load(self, **job: Any) -> subprocess.Popen[str]:
        """Start clients; what each request came to is on their stdout, as JSON."""
        told = json.dumps({"key": KEY, "model": self.told["model"], **job})
        return subprocess.Popen(
            [str(python_of("ray")), str(CLIENTS), self.url, told],
            stdout=subprocess.PIPE,
            text=True,
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
def serving(model: str, *args: str) -> Iterator[RayProcess]:
    """Serve a checkpoint on Ray; afterwards nothing of it may be left."""
    with tempfile.TemporaryDirectory() as folder:  # where no source tree shadows what is installed
        process = psutil.Popen(
            command(model, *args),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ(),
            cwd=folder,
        )
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stderr))
        reader.start()
        giving_up = threading.Timer(START, process.kill)
        giving_up.start()
        try:
            told = process.stdout.readline()
            giving_up.cancel()
            assert told, "".join(lines)
            server = RayProcess(process, json.loads(told), lines)
            yield server
        finally:
            giving_up.cancel()
            if process.poll() is None:
                process.terminate()
            process.wait(timeout=END)
            reader.join()
            process.stdout.close()
            process.stderr.close()
