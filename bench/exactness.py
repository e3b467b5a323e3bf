"""How far off answers are: every test checkpoint, beside transformers in bfloat16.

    python bench/exactness.py

GPTQModel made the checkpoints and the expected logits (float32, of the dequantised weights). Each
number is the relative root-mean-square error of the logits: of the reference kernel, of the kernels
chosen on the CPU, and of transformers' own model in bfloat16 with the dequantised weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import gptq_loader_plugin as gptq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    from altered import DATA, NAMES, dequantized, error, expected, off_by

    print("| checkpoint | reference, float32 | chosen | off by | transformers, bfloat16 |")
    print("|---|---|---|---|---|")
    for name in NAMES:
        ids, right = expected(name)
        kernels = ", ".join(gptq.explain(DATA / name, device="cpu").kernels())
        with torch.inference_mode():
            plain = error(dequantized(DATA / name, torch.bfloat16)(ids).logits, right)
        exact, chosen = off_by(DATA / name, name), off_by(DATA / name, name, backend=None)
        print(f"| {name} | {exact:.1e} | {kernels} | {chosen:.2e} | {plain:.2e} |", flush=True)


if __name__ == "__main__":
    main()
