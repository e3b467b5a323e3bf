"""Run a program to be measured in a process and an environment of its own, turn by turn."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["Worker"]

FOLDER = Path(__file__).parent / "workers"


class Worker:
    """A process of a script in `workers`; it loads once, then times what it is asked for.

    Args:
        python: the interpreter of the environment that holds the program.
        script: its file.
        model: what it loads.
        environment: variables set for it.
        clean: whether this project's modules are kept from it.
    """

    def __init__(
        self,
        python: str,
        script: str,
        model: str,
        environment: dict[str, str],
        *,
        clean: bool = False,
    ) -> None:
        self._command = [python, "-W", "ignore", str(FOLDER / script), model]
        left_out = {"PYTHONPATH"} if clean else set()
        inherited = {name: it for name, it in os.environ.items() if name not in left_out}
        self._environment = {**inherited, "GPTQMODEL_CPU_WORKERS": "4", **environment}
        self._process: subprocess.Popen[str] | None = None
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    def start(self) -> dict[str, Any]:
        """Start it; give what it says once its model is loaded."""
        self._process = subprocess.Popen(  # noqa: S603 - ours, and what the user named
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
        )
        return self._answer()

    def ask(self, what: str, count: int) -> float:
        """Have it read a prompt or write a reply of so many tokens; give seconds."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {count}\n")
        self._process.stdin.flush()
        seconds: float = self._answer()["seconds"]
        return seconds

    def stop(self) -> dict[str, int]:
        """End it; give bytes: `peak`, the most it had resident, and `own`, not of files, now."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        fields = {line.partition(":")[0]: line.split() for line in lines}
        held = {
            name: 1024 * int(fields[it][1])
            for name, it in (("peak", "VmHWM"), ("own", "RssAnon"))
            if it in fields
        }
        process, self._process = self._process, None
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        return held

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._process = None
            self._words.seek(0)
            last = self._words.read().decode(errors="replace").splitlines()[-12:]
            raise SystemExit("\n".join((*last, f"{self._command[3]} ended with code {code}")))
        found: dict[str, Any] = json.loads(line)
        return found
