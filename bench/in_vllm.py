"""Measure vLLM with this package's kernel beside vLLM with its own, on a checkpoint both take.

    python bench/in_vllm.py CHECKPOINT --python PYTHON [--sequences 1 16] [--rounds 5]

PYTHON is that of an environment with vLLM and this package (`make scale` makes one). Each runs in a
process of its own, both loaded at once and asked in turn: a prompt of each, then a reply of each,
--rounds times. Ratios are medians of the rounds' own; above 1, this package's kernel is faster.
On a CPU with AMX vLLM rounds activations to 8 bits, and fails where rows do not fit its blocks;
VLLM_CPU_INT4_W4A8=0 has it multiply in bfloat16 instead, as this package does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from machine import describe
from worker import Worker

NAMES = {"ours": "gptq_loader", "theirs": ""}
PAUSE = 0.5  # seconds before each turn, in which the other process's threads stop spinning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="the folder of a checkpoint that vLLM takes itself")
    parser.add_argument("--python", required=True, help="the Python of vLLM's environment")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--reply", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(describe())
    print(f"VLLM_CPU_INT4_W4A8={os.environ.get('VLLM_CPU_INT4_W4A8', '')}")
    print("| sequences | | ours, tokens/s | vLLM's own, tokens/s | ratio (least to most) |")
    print("| --- | --- | --- | --- | --- |")
    found = [measure(options, count) for count in options.sequences]
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


def measure(options: argparse.Namespace, sequences: int) -> dict[str, Any]:
    """Measure both side by side with so many sequences, and print a row for each of the two."""
    workers, facts = {}, {}
    for name, quantization in NAMES.items():
        environment = {"GPTQ_BENCH_SEQUENCES": str(sequences)}
        if quantization:
            environment["GPTQ_BENCH_QUANTIZATION"] = quantization
        workers[name] = Worker(
            options.python, "run_vllm.py", options.checkpoint, environment, clean=True
        )
        facts[name] = workers[name].start()
    if facts["theirs"]["quantization"] == NAMES["ours"]:
        raise SystemExit("vLLM does not take this checkpoint itself; name one that it takes")
    rates: dict[str, dict[str, list[float]]] = {}
    for number in range(options.rounds + 1):
        for what, count in (("prompt", options.prompt), ("reply", options.reply)):
            for name, worker in workers.items():
                time.sleep(PAUSE)
                rate = sequences * count / worker.ask(what, count)
                if number:  # the first round warms up
                    rates.setdefault(what, {}).setdefault(name, []).append(rate)
    for worker in workers.values():
        worker.stop()
    for what, found in rates.items():
        ratios = [a / b for a, b in zip(found["ours"], found["theirs"], strict=True)]
        print(
            f"| {sequences} | {what} | {statistics.median(found['ours']):,.1f} | "
            f"{statistics.median(found['theirs']):,.1f} | **{statistics.median(ratios):.2f}** "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |",
            flush=True,
        )
    return {"sequences": sequences, "facts": facts, "rates": rates}


if __name__ == "__main__":
    main()
