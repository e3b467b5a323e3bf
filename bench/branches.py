"""Make the six branches of a 2023 repository from the demo's model, and measure each.

    python bench/branches.py --text valid.txt --test test.txt [--offsets 0,512,1024] [--out DIR]

Quantises SmolLM2-135M-Instruct to 4 bits (no groups, 32, 64, 128) and 3 bits (no groups, 128), all
act-order and symmetric, with 16 samples of 512 tokens of `--text`, and prints the perplexity of
each on the first 400,000 characters of `--test`, 20 windows of 1,024 tokens, with its dequantised
weights in bfloat16. A checkpoint that is there already is not made again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import gptq_loader_plugin as gptq
from gptq_loader_plugin.measure.perplexity import measure_perplexity
from gptq_loader_plugin.quantize import QuantizeOptions, quantize_model
from gptq_loader_plugin.quantize.demo_model import find_demo_model

BRANCHES = {
    "main": (4, -1),
    "gptq-4bit-32g-actorder_True": (4, 32),
    "gptq-4bit-64g-actorder_True": (4, 64),
    "gptq-4bit-128g-actorder_True": (4, 128),
    "gptq-3bit--1g-actorder_True": (3, -1),
    "gptq-3bit-128g-actorder_True": (3, 128),
}
CHARACTERS = 400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--test", type=Path, required=True, help="text to predict")
    parser.add_argument("--offsets", default="0", help="tokens before the first sample")
    parser.add_argument("--out", type=Path, default=Path("build/branches"))
    parser.add_argument("--backend", default="dense", help="the kernel to measure with")
    arguments = parser.parse_args()
    test = arguments.test.read_text(encoding="utf-8")[:CHARACTERS]
    offsets = [int(it) for it in arguments.offsets.split(",")]
    print("| branch | " + " | ".join(f"offset {it}" for it in offsets) + " | median | seconds |")
    print("|---|" + "---|" * (len(offsets) + 2))
    for name, (bits, group_size) in BRANCHES.items():
        found, began = [], time.monotonic()
        for offset in offsets:
            folder = arguments.out / (f"{name}-{offset}" if offset else name)
            make(folder, bits, group_size, offset, arguments.text)
        seconds = (time.monotonic() - began) / len(offsets)
        for offset in offsets:
            folder = arguments.out / (f"{name}-{offset}" if offset else name)
            with gptq.load(folder, backend=arguments.backend, check=False) as model:
                found.append(measure_perplexity(model, test).perplexity)
        cells = " | ".join(f"{it:.2f}" for it in found)
        print(f"| {name} | {cells} | {statistics.median(found):.2f} | {seconds:.0f} |", flush=True)


def make(folder: Path, bits: int, group_size: int, offset: int, text: Path) -> None:
    """Quantise one branch, unless it is there."""
    if (folder / "config.json").is_file():
        return
    source = find_demo_model(progress=lambda _: None)
    options = QuantizeOptions.model_validate(
        {
            "bits": bits,
            "group_size": group_size,
            "order": "act",
            "samples": 16,
            "seq_len": 512,
            "stride": 2048,
            "offset": offset,
        }
    )
    quantize_model(source, folder, options=options, text=text)


if __name__ == "__main__":
    main()
