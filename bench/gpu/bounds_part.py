"""Run every packed kernel under compute-sanitizer, which stops at a read or write out of bounds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from record import Record
    from where import Where

__all__ = ["find_sanitizer", "run"]

PLACES = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    "/usr/local/cuda-13.0/bin",
    "/opt/nvidia/cuda/bin",
)
FOUND = 99  # the exit code for errors that were found
LINES = 12  # of its output that a check shows


def run(record: Record, where: Where) -> None:
    """Run the products plainly first, which compiles their kernels, then watched."""
    sanitizer = find_sanitizer() if where.is_gpu else None
    for program in ("linears", "steps"):
        if where.tiny and program == "steps":
            continue
        command = [sys.executable, str(Path(__file__).with_name("products.py")), program]
        command += [str(where.folder), *["--tiny"] * where.tiny]
        plain, words = _call(command, record.left)
        record.check(f"{program}: right without a sanitizer", passed=plain == 0, detail=words)
        name = f"{program}: nothing out of bounds"
        if sanitizer is None:
            why = "compute-sanitizer is not here" if where.is_gpu else "there is no GPU"
            record.check(name, passed=None, detail=why)
            continue
        options = [
            "--tool",
            "memcheck",
            "--error-exitcode",
            str(FOUND),
            "--report-api-errors",
            "no",
        ]
        # Each tensor is an allocation of its own, unless graphs are captured, which forbid that.
        caching = {} if program == "steps" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code, words = _call([sanitizer, *options, *command], record.left, caching)
        finished = code == 0 and "ERROR SUMMARY" in words
        passed = True if finished else False if code == FOUND else None
        record.check(name, passed=passed, detail=words if not passed else "0 errors")


def find_sanitizer() -> str | None:
    """Find compute-sanitizer: on PATH, or in a CUDA toolkit."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home) / "bin") for home in homes if home]
    path = os.pathsep.join((os.environ.get("PATH", ""), *folders, *PLACES))
    return shutil.which("compute-sanitizer", path=path)


def _call(
    command: list[str], seconds: float, environ: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a command: its exit code, None where it took too long; and the end of its output."""
    try:
        done = subprocess.run(  # noqa: S603 - ours
            command,
            env={**os.environ, **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(seconds, 1),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, "it took too long"
    return done.returncode, "\n".join(done.stdout.splitlines()[-LINES:])
