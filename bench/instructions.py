"""Time one layer by the code for each processor that this one runs: instructions and activations.

    python bench/instructions.py [--shape 2048x2048] [--rows 1,4] [--rounds 60]

One thread, groups of 128, no act-order, all by turns in one process; microseconds, the least of all
rounds. The weight fits into a cache, so this is what the code costs and not what memory does. Each
code's error is printed beside it: the norm of the difference from float64, over its norm.
"""

from __future__ import annotations

import argparse
import time

import torch
from machine import describe

from gptq_loader_kernels.cpu.library import Activations, Isa, load_library
from gptq_loader_kernels.cpu.linear import NativeLinear
from gptq_loader_plugin.conformance.layers import Case, make_layer

CODES = (
    (Isa.PLAIN, Activations.FLOAT32),
    (Isa.AVX2, Activations.FLOAT32),
    (Isa.AVX2, Activations.INT16),
    (Isa.AVX2, Activations.INT8),
    (Isa.AVX_VNNI, Activations.INT16),
    (Isa.AVX_VNNI, Activations.INT8),
    (Isa.AVX512, Activations.FLOAT32),
    (Isa.AVX512_VNNI, Activations.INT16),
    (Isa.AVX512_VNNI, Activations.INT8),
)


def main() -> None:
    """Print a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="2048x2048", help="inputs by outputs")
    parser.add_argument("--rows", default="1,4", help="rows of x")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    inputs, outputs = (int(size) for size in arguments.shape.split("x"))
    codes = [code for code in CODES if code[0] <= load_library().gptq_isa()]
    print(f"{describe()}, of which one is used\n")
    for rows in (int(count) for count in arguments.rows.split(",")):
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
        print(f"| {arguments.shape}, {rows} rows | 2 bits | 3 bits | 4 bits | 8 bits |")
        print("|---|---|---|---|---|")
        columns = [
            measure(bits, inputs, outputs, codes, x, arguments.rounds) for bits in (2, 3, 4, 8)
        ]
        for number, (isa, activations) in enumerate(codes):
            cells = [f"{column[number][0]:.0f} ({column[number][1]:.0e})" for column in columns]
            print(f"| {isa.name}, {activations.name} | {' | '.join(cells)} |")
        print()


def measure(
    bits: int,
    inputs: int,
    outputs: int,
    codes: list[tuple[Isa, Activations]],
    x: torch.Tensor,
    rounds: int,
) -> list[tuple[float, float]]:
    """Return each code's microseconds and error."""
    case = Case(bits=bits, group_size=128, act_order=False, rows=inputs, columns=outputs)
    _, packed, weight = make_layer(case)
    size = {"in_features": inputs, "out_features": outputs}
    layers = [
        NativeLinear(packed, **size, isa=isa, activations=activations) for isa, activations in codes
    ]
    right = x.double() @ weight.t()
    # Of x in float32: y in bfloat16 would hide what the code itself rounds.
    wide = [layer(x.float()) for layer in layers]
    errors = [float((y.double() - right).norm() / right.norm()) for y in wide]
    best = [float("inf")] * len(layers)
    for _ in range(rounds):
        for number, layer in enumerate(layers):
            began = time.perf_counter()
            layer(x)
            best[number] = min(best[number], time.perf_counter() - began)
    return [(seconds * 1e6, error) for seconds, error in zip(best, errors, strict=True)]


if __name__ == "__main__":
    main()
