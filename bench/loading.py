"""How long a load takes, from the disk and from the system's cache, beside reading the file once.

    python bench/loading.py [REF] [--rounds 3] [--backend cpu] [--json]

Each load is in a process of its own that has imported what a load imports (by loading a tiny
checkpoint). *Cold*: the checkpoint's pages are dropped first (posix_fadvise DONTNEED; Linux only).
*Read*: the same, and the files are read to their end, 8 MB at a time. Medians of the rounds, which
alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.reference import resolve

TINY = Path(__file__).parents[1] / "tests" / "data" / "checkpoints" / "gptq-4bit-32g-act-sym"
CHUNK = 8 << 20
CODE = """
import sys, time
import gptq_loader_plugin as gptq
gptq.load(sys.argv[3], device="cpu").close()
began = time.perf_counter()
gptq.load(sys.argv[1], device="cpu", backend=sys.argv[2] or None)
print(time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reference", nargs="?", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="", help="a kernel, for every layer")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    files = weight_files(arguments.reference)
    times: dict[str, list[float]] = {"read": [], "cold": [], "warm": []}
    for _ in range(arguments.rounds):
        drop(files)
        times["read"].append(read(files))
        drop(files)
        times["cold"].append(load(arguments.reference, arguments.backend))
        times["warm"].append(load(arguments.reference, arguments.backend))
    size = sum(file.stat().st_size for file in files)
    found = {name: statistics.median(it) for name, it in times.items()}
    if arguments.json:
        print(json.dumps({"bytes": size, **found, "times": times}))
        return
    print("| | seconds | of reading once | MB a second |")
    print("|---|---|---|---|")
    for name, seconds in found.items():
        rate = size / seconds / 1e6
        print(f"| {name} | {seconds:.2f} | {seconds / found['read']:.2f} | {rate:.0f} |")


def weight_files(reference: str) -> list[Path]:
    path = resolve(reference, plugins=gptq.Plugins(installed=True))
    return sorted({info.file for info in open_checkpoint(path).headers.values()})


def drop(files: list[Path]) -> None:
    """Have the system forget the files' pages."""
    os.sync()  # pages that are not on the disk yet stay
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(files: list[Path]) -> float:
    """Read the files once, and say how long it took."""
    buffer = bytearray(CHUNK)
    began = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - began


def load(reference: str, backend: str) -> float:
    """Load in a process of its own, and say how long that took, imports left out."""
    command = [sys.executable, "-W", "ignore", "-c", CODE, reference, backend, str(TINY)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return float(done.stdout)


if __name__ == "__main__":
    main()
