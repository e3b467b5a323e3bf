"""Measure ik_llama.cpp by its own llama-bench, a run of it for each turn; loading is not counted.

A turn's tokens come after none, not after 16 of a prompt, and no token is picked: it is timed for
less than the other programs are.
"""

from __future__ import annotations

import json
import os
import subprocess

from turns import Loaded, serve

THREADS = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
REPACKED = ("-rtr", "1")  # weights are repacked as they are loaded


def load(file: str) -> Loaded:
    binary = os.environ["BENCH_BINARY"]

    def run(prompt: int, reply: int) -> dict[str, object]:
        sizes = ("-p", str(prompt), "-n", str(reply), "-r", "1", "-t", THREADS, "-o", "json")
        command = [binary, "-m", file, *sizes, *REPACKED]
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - what the user named
        found: list[dict[str, object]] = json.loads(done.stdout)
        return found[0]

    def seconds(prompt: int, reply: int) -> float:
        return float(str(run(prompt, reply)["avg_ns"])) / 1e9

    first = run(16, 0)
    facts = {"version": first.get("build_commit", ""), "threads": int(THREADS)}
    return Loaded(lambda count: seconds(count, 0), lambda count: seconds(0, count), facts)


if __name__ == "__main__":
    serve(load)
