"""Run vLLM's server, and end with the process that started this one, however that ends.

    python -m gptq_loader_extensions.vllm.program --model MODEL [vLLM's options]

The standard input is a pipe that nobody writes to: it ends when the parent does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

__all__ = ["main"]

LAST = 20.0  # seconds that vLLM gets to end its own processes


def main() -> None:
    """Run what `vllm serve` runs: that command itself does not start in vLLM's build for CPUs."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from vllm.entrypoints.launchers.api_server.entry import main as run_server

    run_server()


def _end_with_parent() -> None:
    """Wait for the parent's end; then have vLLM end, and then every process of this session."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
