"""Run vLLM's server, and exit when the parent process exits, however that ends.

    python -m gptq_loader_extensions.vllm.program --model MODEL [vLLM's options]

The standard input is a pipe that nobody writes to: it closes when the parent exits.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

__all__ = ["main"]

GRACE_SECONDS = 20.0  # for vLLM to end its own processes


def main() -> None:
    """Run what `vllm serve` runs: that command itself does not start in vLLM's build for CPUs."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from vllm.entrypoints.launchers.api_server.entry import main as run_server

    run_server()


def _exit_with_parent() -> None:
    """Wait until the parent exits; then stop vLLM, and then every process of this session."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
