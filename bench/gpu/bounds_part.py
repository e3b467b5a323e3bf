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
    """Run products plainly first, which compiles their kernels, then watched; then whole steps."""
    sanitizer = find_sanitizer() if where.is_gpu else None
    linears, steps = (_command(where, program) for program in ("linears", "steps"))
    code, words = _call(linears, record.left)
    record.check("linears: right without a sanitizer", passed=code == 0, detail=words)
    if sanitizer is None:
        why = "compute-sanitizer is not here" if where.is_gpu else "there is no GPU"
        record.check("nothing out of bounds", passed=None, detail=why)
        return
    watched = [sanitizer, "--tool", "memcheck", "--error-exitcode", str(FOUND)]
    watched += ["--report-api-errors", "no"]
    # Each tensor is an allocation of its own, unless graphs are captured, which forbid that.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name, command, environ in (("linears", linears, alone), ("steps", steps, {})):
        code, words = _call([*watched, *command], record.left, environ)
        finished = code == 0 and "ERROR SUMMARY" in words
        passed = True if finished else False if code == FOUND else None
        record.check(f"{name}: nothing out of bounds", passed=passed, detail=words)


def _command(where: Where, program: str) -> list[str]:
    file = Path(__file__).with_name("products.py")
    return [sys.executable, str(file), program, str(where.folder), *["--tiny"] * where.tiny]


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
