"""Time the CPU kernels on one layer beside torch's bfloat16 and float32 linears.

    python bench/cpu.py [--shapes 4096x4096,4096x11008] [--rows 1,4,16,64,512] [--threads 2]

Prints milliseconds, the least of interleaved rounds in one process; groups of 128, act-order. `cpu`
is the native kernel in bfloat16 (in float32 where the processor has no AVX512-BF16).
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import torch

from gptq_loader_kernels._int4 import Int4Kernel
from gptq_loader_kernels.cpu import CpuKernel
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import find_device

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 5
FLOPS = 5e9  # of one timing at most, so that a round stays short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,4096x11008,576x1536")
    parser.add_argument("--rows", default="1,4,16,64,512", help="rows of x")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = find_device("cpu")
    flags = " ".join(sorted(device.features))
    print(f"{device.name} ({flags}), {arguments.threads} threads, torch {torch.__version__}")
    print("| shape | rows | cpu 2-bit | 3-bit | 4-bit | 8-bit | cpu-int4 | bf16 | fp32 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        candidates = make(rows, columns)
        for count in map(int, arguments.rows.split(",")):
            x = torch.randn(count, rows).to(torch.bfloat16)
            found = dict.fromkeys(candidates, float("inf"))
            repeats = max(1, min(20, int(FLOPS / (2 * count * rows * columns))))
            for _ in range(ROUNDS):
                for name, call in candidates.items():
                    found[name] = min(found[name], least(call, x, repeats))
            cells = " | ".join(f"{1e3 * it:.3f}" for it in found.values())
            print(f"| {shape} | {count} | {cells} |", flush=True)


def make(rows: int, columns: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Make the layers to be timed, by name."""
    device = find_device("cpu")
    candidates: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    size = 128 if rows % 128 == 0 else 64
    for bits in (2, 3, 4, 8):
        layer = make_layer(Case(bits=bits, group_size=size, rows=rows, columns=columns))[:2]
        candidates[f"cpu {bits}-bit"] = CpuKernel().prepare(*layer, device)
    layer = make_layer(Case(bits=4, group_size=size, rows=rows, columns=columns))[:2]
    candidates["cpu-int4"] = Int4Kernel().prepare(*layer, device)
    weight = torch.randn(columns, rows)
    half = weight.to(torch.bfloat16)
    candidates["bf16"] = lambda x: torch.nn.functional.linear(x, half)
    candidates["fp32"] = lambda x: torch.nn.functional.linear(x.float(), weight)
    return candidates


def least(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, repeats: int) -> float:
    """Give the least seconds of some calls."""
    found = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        call(x)
        found = min(found, time.perf_counter() - began)
    return found


if __name__ == "__main__":
    main()
