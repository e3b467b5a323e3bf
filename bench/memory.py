"""What a load takes: peak anonymous memory above that of the imports, in checkpoint sizes.

    python bench/memory.py [REF] [--json]

Loads REF, the demo unless told, once for each kernel of the CPU, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TINY = Path(__file__).parents[1] / "tests" / "data" / "checkpoints" / "gptq-4bit-32g-act-sym"
CODE = """
import json, sys, threading, time
from pathlib import Path
import gptq_loader_plugin as gptq
gptq.load(sys.argv[3], device="cpu").close()  # imports what a load imports

def anonymous():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

before = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
began = time.perf_counter()
model = gptq.load(sys.argv[1], device="cpu", backend=sys.argv[2] or None)
seconds = time.perf_counter() - began
done = True
thread.join()
plan = model.plan
print(json.dumps({
    "kernels": plan.kernels(), "peak": peak - before, "checkpoint": plan.checkpoint_bytes,
    "weights": plan.weight_bytes, "seconds": seconds,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", nargs="?", default="demo")
    parser.add_argument("--json", action="store_true", help="the chosen kernels alone, as JSON")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(measure(arguments.reference, "")))
        return
    print("| kernels | peak above imports | checkpoint | ratio | planned weights | seconds |")
    print("|---|---|---|---|---|---|")
    for backend in ("", "dense", "reference"):
        found = measure(arguments.reference, backend)
        peak, size = found["peak"], found["checkpoint"]
        print(
            f"| {', '.join(found['kernels'])} | {peak / 1e6:.0f} MB | {size / 1e6:.0f} MB "
            f"| {peak / size:.2f} | {found['weights'] / 1e6:.0f} MB | {found['seconds']:.1f} |",
            flush=True,
        )


def measure(reference: str, backend: str) -> dict[str, Any]:
    """Load once, in a process of its own: bytes and seconds, by name."""
    command = [sys.executable, "-W", "ignore", "-c", CODE, reference, backend, str(TINY)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
