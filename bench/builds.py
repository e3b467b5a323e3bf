"""Time one row by a packed layer with two builds of the native library, by turns in one process.

    python bench/builds.py OTHER.so [--threads 2] [--size 2048] [--layers 60] [--rounds 24]

OTHER.so is an earlier `gptq_loader_kernels/cpu/_gptq_cpu.so`, copied aside before a change; both
must agree on interface.h. So many layers are multiplied one after the other that none is in a cache
when its turn comes again. Prints, for each width and each kind of processor that this one can run,
the least microseconds of both, the median ratio of the rounds, and bytes of weights a second.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from pathlib import Path

import torch

from gptq_loader_kernels.cpu.library import Activations, Isa, choose_code, load_library
from gptq_loader_kernels.cpu.linear import TYPES, NativeLinear
from gptq_loader_plugin.conformance.layers import Case, make_layer

BITS = (2, 3, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the other build")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=2048, help="a layer's rows and columns")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=24)
    options = parser.parse_args()
    builds = {"other": ctypes.CDLL(str(options.other.resolve())), "this": load_library()}
    print(f"{options.size}x{options.size}, groups of 128, one row, {options.threads} threads\n")
    print("| bits | code | other, us | this, us | other / this | this, GB/s |")
    print("|---|---|---|---|---|---|")
    best, _ = choose_code(None, None)
    for bits in BITS:
        layers = make_layers(bits, options.size, options.layers)
        for isa in (
            it for it in (Isa.AVX2, Isa.AVX_VNNI, Isa.AVX512_VNNI, Isa.AVX512_BF16) if it <= best
        ):
            taken = by_turns(builds, layers, isa, threads=options.threads, rounds=options.rounds)
            other, this = taken["other"], taken["this"]
            ratio = statistics.median(a / b for a, b in zip(other, this, strict=True))
            speed = options.size**2 * bits / 8 / min(this) / 1e9
            print(
                f"| {bits} | {isa.name} | {min(other) * 1e6:.0f} | {min(this) * 1e6:.0f} "
                f"| {ratio:.2f} | {speed:.1f} |"
            )


def make_layers(bits: int, size: int, count: int) -> list[NativeLinear]:
    """Make layers of the same random numbers, each in memory of its own."""
    case = Case(bits=bits, group_size=128, rows=size, columns=size, sym=True, bias=False)
    _, packed, _ = make_layer(case)
    return [NativeLinear(packed, in_features=size, out_features=size) for _ in range(count)]


def by_turns(
    builds: dict[str, ctypes.CDLL],
    layers: list[NativeLinear],
    isa: Isa,
    *,
    threads: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Give each build's seconds a layer, round by round; who begins changes every round."""
    size = layers[0].in_features
    x = torch.randn(1, size).to(torch.bfloat16)
    y = torch.empty_like(x)
    described = [ctypes.c_void_p(ctypes.addressof(layer.filled())) for layer in layers]
    arguments = (
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(1),
        TYPES[torch.bfloat16], int(isa), int(Activations.INT16), threads,
    )  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in builds}
    for index in range(rounds):
        for name in sorted(builds, reverse=bool(index % 2)):
            began = time.perf_counter()
            for layer in described:
                if builds[name].gptq_gemv(layer, *arguments):
                    raise MemoryError("no memory for x")
            taken[name].append((time.perf_counter() - began) / len(layers))
    return taken


if __name__ == "__main__":
    main()
