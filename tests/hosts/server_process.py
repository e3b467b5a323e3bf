"""The server as a person starts it, for other programs to talk to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ONE", "OTHER", "ServerProcess", "serving"]

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE = "gptq-4bit-32g-act-sym"
OTHER = "gptq-3bit-128g-act-sym"


@dataclass
class ServerProcess:
    """A server that runs in a process of its own.

    Attributes:
        url: where it listens.
        lines: what it wrote to stderr.
    """

    url: str
    lines: list[str] = field(default_factory=list)

    def requests(self) -> list[dict[str, Any]]:
        """Give what it logged of each request."""
        return [json.loads(it) for it in list(self.lines) if it.startswith("{")]


@contextmanager
def serving(*args: str) -> Iterator[ServerProcess]:
    """Serve a tiny checkpoint, with the others of the tests beside it."""
    command = [sys.executable, "-m", "gptq_loader_plugin", "serve", ONE, "--models-dir", str(DATA)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", "--json", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    stderr, lines = process.stderr, []
    reader = threading.Thread(target=lambda: lines.extend(stderr))
    try:
        told = process.stdout.readline()
        assert told, process.communicate()[1]
        server = ServerProcess(json.loads(told)["url"], lines)
        reader.start()
        yield server
        assert process.poll() is None, "".join(lines)
    finally:
        process.terminate()
        process.wait(timeout=60)
        if reader.ident is not None:
            reader.join()
        process.stdout.close()
        stderr.close()
