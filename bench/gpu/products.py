"""Multiply once by each layout of each packed kernel: what compute-sanitizer watches.

    python bench/gpu/products.py linears FOLDER | steps FOLDER

Sides are multiples of no tile, so that every tile's edge is masked. Exits 1 where an answer is
wrong.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import torch
from where import Where

from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import find_device

SIDES, TINY_SIDES = (416, 200), (96, 40)
ROWS = (1, 17)  # a tile that splits the sum, and one that does not, or in fewer parts
OFF = 1e-2


def linears(where: Where) -> int:
    """Multiply; return how many answers are wrong."""
    wrong = 0
    for bits, act_order in itertools.product((2, 3, 4, 8), (False, True)):
        if where.tiny and bits != 4:
            continue
        sides = TINY_SIDES if where.tiny else SIDES
        case = Case(
            bits=bits, group_size=32, act_order=act_order, sym=False, rows=sides[0],
            columns=sides[1], bias=True,
        )  # fmt: skip
        layer, packed, weight = make_layer(case)
        for kernel in where.fused_kernels(layer):
            module = kernel.prepare(layer, packed, where.device)
            for count, dtype in zip(ROWS, (torch.float16, torch.bfloat16), strict=True):
                x = torch.randn(count, case.rows).to(dtype)
                y = module(x.to(where.device.torch_name)).cpu().double()
                bias = 0.0 if packed.bias is None else packed.bias.double()
                right = x.double() @ weight.T + bias
                error = float((y - right).norm() / right.norm())
                wrong += not error <= OFF
                print(f"{kernel.name}, {layer}, {count} rows of {dtype}: off by {error:.1e}")
    return wrong


def steps(where: Where) -> int:
    """Write replies side by side; return how many went wrong."""
    from checkpoints import make_llama
    from models_part import batch_replies, prompts_of

    path = make_llama(where.folder / "checkpoints" / "llama-bounds", layers=1)
    with where.load(path, check=False) as model:
        replies = batch_replies(model, prompts_of((3, 40, 17), 256), 4, watched=False)
    print(f"{len(replies)} replies")
    return sum(not reply.text for reply in replies)


if __name__ == "__main__":
    device = find_device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None)
    here = Where(device, tiny="--tiny" in sys.argv, folder=Path(sys.argv[2]))
    sys.exit(1 if {"linears": linears, "steps": steps}[sys.argv[1]](here) else 0)
