"""How good the quantiser is: perplexity and KL divergence by bits, groups, effort and offset.

    python bench/quality.py --text valid.txt --test test.txt [--bits 4,3,2] [--groups=-1,128,64,32]
        [--tools fast,standard,best] [--offsets 0,512,1024] [--samples 64] [--out DIR]

Quantises SmolLM2-135M-Instruct, symmetric, calibrated on samples of 512 tokens of `--text`, and
prints for each checkpoint: perplexity on the first 400,000 characters of `--test` (20 windows of
1,024 tokens, dequantised weights in bfloat16), the KL divergence from the float model and how often
both have the same likeliest token, on text after those characters, and the seconds that quantising
took. A checkpoint that is there already is not made again. A tool is one of our efforts, or an
effort and an order (`standard:group-aware`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from machine import describe

import gptq_loader_plugin as gptq
from gptq_loader_plugin.measure.perplexity import measure_perplexity
from gptq_loader_plugin.quantize import QuantizeOptions, quantize_model
from gptq_loader_plugin.quantize.demo_model import find_demo_model
from gptq_loader_plugin.quantize.quality import QUALITY_FILE

CHARACTERS = 400_000
HELD_OUT = 8_000  # characters behind those: some 2,000 tokens
SECONDS_FILE = "seconds.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--test", type=Path, required=True, help="text to predict")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--groups", default="-1,128,64,32")
    parser.add_argument("--tools", default="fast,standard,best")
    parser.add_argument("--offsets", default="0", help="tokens before the first sample")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("build/quality"))
    arguments = parser.parse_args()
    test = arguments.test.read_text(encoding="utf-8")
    print(describe())
    print("\n| bits | group | tool | offset | perplexity | KL | same token | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    cells = itertools.product(
        (int(it) for it in arguments.bits.split(",")),
        [int(it) for it in arguments.groups.split(",")],
        arguments.tools.split(","),
        [int(it) for it in arguments.offsets.split(",")],
    )
    for bits, group, tool, offset in cells:
        effort, _, order = tool.partition(":")
        fields: dict[str, Any] = {
            "bits": bits,
            "group_size": group,
            "effort": effort,
            "order": order or "static",
            "samples": arguments.samples,
            "seq_len": 512,
            "offset": offset,
        }
        name = f"{bits}bit-{group}g-{tool.replace(':', '-')}-{arguments.samples}-{offset}"
        folder = arguments.out / name
        seconds = make(folder, fields, arguments.text, test[CHARACTERS : CHARACTERS + HELD_OUT])
        with gptq.load(folder, backend="dense", check=False) as model:
            perplexity = measure_perplexity(model, test[:CHARACTERS]).perplexity
        compared = json.loads((folder / QUALITY_FILE).read_text())["compared"]
        print(
            f"| {bits} | {group} | {tool} | {offset} | {perplexity:.2f} | {compared['kl']:.4f} | "
            f"{compared['top1']:.1%} | {seconds:.0f} |",
            flush=True,
        )


def make(folder: Path, fields: dict[str, Any], text: Path, held_out: str) -> float:
    """Quantise, unless it is there; return the seconds that took."""
    kept = folder / SECONDS_FILE
    if not kept.is_file():
        source = find_demo_model(progress=lambda _: None)
        began = time.monotonic()
        options = QuantizeOptions.model_validate(fields)
        quantize_model(source, folder, options=options, text=text, held_out=held_out)
        kept.write_text(json.dumps(time.monotonic() - began))
    seconds: float = json.loads(kept.read_text())
    return seconds


if __name__ == "__main__":
    main()
