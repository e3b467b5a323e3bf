"""Prove and measure everything on this machine's GPU, the most important first: `make gpu`.

    python bench/gpu/run.py [--budget 480] [--json FILE] [--parts NAME,...] [--tiny] [--together]

Works from the tree alone, installed or not (bare.py). Each part is a process of its own, so that a
part that crashes the GPU's context, or runs out of its share of the time, takes no other along. The
JSON file is whole after every part; a table is printed last (docs/kernels/gpu.md says how to read
it). Without a GPU everything is tiny, and Triton's kernels are interpreted. Exits 1 where a check
failed or a part crashed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bare import ROOT, make_importable
from record import Record, read_json, write_json
from report import print_report

if TYPE_CHECKING:
    from record import State

# In order of importance: the seconds of a budget of 480 that each may take. Together more, since
# most take less than they may; what is left when a part begins is the most it gets.
PARTS = {
    "conformance": 110,
    "models": 70,
    "capture": 40,
    "bounds": 80,
    "layers": 70,
    "llama": 110,
    "tune": 60,
}
BUDGET = 480
SHORTEST = 8  # seconds in which nothing worth while gets done
GRACE = 5  # seconds that a part has, past its time, to end by itself
LINES = 15  # of a crashed part's output that are kept
VERSION = 1  # of the JSON


def main() -> int:
    options = _options()
    folder: Path = options.folder or Path(tempfile.mkdtemp(prefix="gptq-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    taken = make_importable(folder / "site")
    os.environ["GPTQ_LOADER_CACHE"] = str(folder / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    on_gpu = _finds_gpu()
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    tiny = options.tiny or not on_gpu
    if options.part:
        _run_part(options.part, options.json, options.seconds, folder, tiny=tiny)
        return 0
    names = options.parts.split(",") if options.parts else list(PARTS)
    results: dict[str, Any] = {
        "version": VERSION,
        "machine": _describe(),
        "tiny": tiny,
        "budget": options.budget,
        "from_tree": taken,
        "parts": {name: {"state": "not reached"} for name in names},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name in names:
        left = options.budget - (time.monotonic() - began)
        seconds = min(left - GRACE, PARTS[name] * options.budget / BUDGET)
        if seconds >= SHORTEST or options.together:
            _say(f"{name}: at most {seconds:.0f} s")
            results["parts"][name] = _part(name, seconds, folder, options, tiny=tiny)
        results["seconds"] = time.monotonic() - began
        write_json(options.json, results)
    failed = print_report(results)
    _say(f"everything is in {options.json}, and what the parts wrote in {folder}")
    return int(failed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu.json")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test, on the CPU too")
    parser.add_argument("--together", action="store_true", help="all parts in this process")
    parser.add_argument("--folder", type=Path, help="for checkpoints, caches and logs")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.parts and (unknown := set(options.parts.split(",")) - set(PARTS)):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    return options


def _finds_gpu() -> bool:
    """Whether there is a GPU, and Triton's interpreter was not asked for in its place."""
    from gptq_loader_plugin.device import find_device

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return find_device().type in ("cuda", "rocm") and not interpreted


def _part(
    name: str, seconds: float, folder: Path, options: argparse.Namespace, *, tiny: bool
) -> dict[str, Any]:
    """Run a part, in a process of its own unless all are to be together; return what came of it."""
    file, began = folder / f"{name}.json", time.monotonic()
    file.unlink(missing_ok=True)
    if options.together:
        state, error = _run_here(name, file, seconds, folder, tiny=tiny)
    else:
        command = [sys.executable, str(Path(__file__).resolve()), "--part", name]
        command += ["--json", str(file), "--seconds", str(seconds), "--folder", str(folder)]
        state, error = _run_there(command + ["--tiny"] * tiny, seconds + GRACE, folder, name)
    return {
        "state": state,
        "seconds": time.monotonic() - began,
        "error": error,
        **read_json(file),
    }


def _run_here(
    name: str, file: Path, seconds: float, folder: Path, *, tiny: bool
) -> tuple[State, str]:
    try:
        _run_part(name, file, seconds, folder, tiny=tiny)
    except Exception:  # noqa: BLE001 - the other parts go on
        return "crashed", traceback.format_exc()
    return "done", ""


def _run_there(command: list[str], seconds: float, folder: Path, name: str) -> tuple[State, str]:
    log = folder / f"{name}.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(  # noqa: S603 - ours
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # with those it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code is None:
        return "out of time", ""
    if code == 0:
        return "done", ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "crashed", "\n".join((f"exit code {code}", *lines[-LINES:]))


def _run_part(name: str, file: Path, seconds: float, folder: Path, *, tiny: bool) -> None:
    from where import Where

    from gptq_loader_plugin.device import find_device

    on_cpu = os.environ.get("TRITON_INTERPRET") == "1"
    device = find_device("cpu" if on_cpu else None)
    part = import_module(f"{name}_part")
    part.run(Record(file, seconds), Where(device, tiny=tiny, folder=folder))


def _describe() -> dict[str, Any]:
    """Describe what figures depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from gptq_loader_plugin.device import find_device

    device = find_device()
    versions = {}
    for package in ("torch", "triton", "transformers"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "device": str(device),
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
