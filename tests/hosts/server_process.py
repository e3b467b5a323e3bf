"""The server as a person starts it, for other programs to talk to."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from processes import start_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import ServerProcess

__all__ = ["ONE", "OTHER", "serving"]

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE = "gptq-4bit-32g-act-sym"
OTHER = "gptq-3bit-128g-act-sym"


@contextmanager
def serving(*args: str) -> Iterator[ServerProcess]:
    """Serve a tiny checkpoint, with the others of the tests beside it."""
    command = [sys.executable, "-m", "gptq_loader_plugin", "serve", ONE, "--models-dir", str(DATA)]
    options = ["--port", "0", "--device", "cpu", "--json", *args]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with start_server([*command, *options], sent=signal.SIGTERM, env=environ) as server:
        yield server
        assert server.process.poll() is None, server.log
