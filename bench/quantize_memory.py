"""What quantising takes: the peak of memory, foretold and measured, and seconds.

    python bench/dense_shapes.py Llama-2-7B FOLDER --layers 2
    python bench/quantize_memory.py FOLDER [--effort fast] [--samples 8] [--seq-len 512]
        [--max-memory 10GB]

Quantises the model in FOLDER to 4 bits in groups of 128, in a process of its own, and prints one
row: what the command foretold, the most memory that the process held at any time, and seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-memory", help="as gptq-loader quantize takes it")
    arguments = parser.parse_args()
    options = [f"--effort={arguments.effort}", f"--samples={arguments.samples}"]
    options.append(f"--seq-len={arguments.seq_len}")
    if arguments.max_memory:
        options.append(f"--max-memory={arguments.max_memory}")
    with tempfile.TemporaryDirectory(dir=arguments.folder.parent) as out:
        command = [sys.executable, "-m", "gptq_loader_plugin", "quantize", *options]
        began = time.monotonic()
        ran = subprocess.Popen(  # noqa: S603
            [*command, str(arguments.folder), f"{out}/quantised"],
            stderr=subprocess.PIPE,
            text=True,
        )
        words = ran.stderr.read() if ran.stderr else ""
        _, status, used = os.wait4(ran.pid, 0)
        ran.returncode = os.waitstatus_to_exitcode(status)
    if ran.returncode:
        sys.exit(words)
    seconds = time.monotonic() - began
    foretold = re.search(r"takes up to ([\d.]+ [kMGT]?B)", words)
    print(describe())
    print("\n| model | effort | samples | foretold | most memory held | seconds |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {arguments.folder.name} | {arguments.effort} | {arguments.samples} of "
        f"{arguments.seq_len} tokens | {foretold[1] if foretold else '-'} "
        f"| {used.ru_maxrss * 1024 / 1e9:.2f} GB | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
