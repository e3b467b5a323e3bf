"""Time one layer: this package's CPU kernel beside torch's operators and GPTQModel's kernel.

    python bench/kernels.py [--shapes 4096x4096,4096x11008] [--rows 1,4,16,64,512] [--json FILE]

All in one process and by turns: `cpu` at 2, 3, 4 and 8 bits, torch's bfloat16 linear, torch's 4-bit
operator, and GPTQModel's 4-bit kernel where the Python that runs this has GPTQModel
(docs/benchmarks.md). Groups of 128, no act-order. Each call takes another copy of its weights, and
the copies of each candidate fill --copies megabytes, more than a cache holds: at one row of x they
come from memory, whose speed is measured in every round. Times are the median of all calls, and the
least.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from machine import describe

from gptq_loader_kernels.cpu import CpuKernel
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.kernel.packing import pack_columns
from gptq_loader_plugin.measure.speed import MEMORY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_plugin.kernel import PackedLinear

    Call = Callable[[torch.Tensor], torch.Tensor]

GROUP = 128
BITS = (2, 3, 4, 8)
CALLS = 100  # of a candidate in a round, fewer where there is much to multiply
FLOPS = 5e9  # of one candidate in a round, about
FIRST_CALLS = 5  # of a candidate's turn, untimed: the threads of the one before still wait for work


@dataclass(slots=True)
class Candidate:
    """One way to multiply, with its copies of a weight.

    Attributes:
        name: what the table calls it.
        size: bytes of one copy.
        calls: one for each copy.
        seconds: of every call, once timed.
    """

    name: str
    size: int
    calls: list[Call]
    seconds: list[float] = field(default_factory=list)
    _next: int = 0

    def run(self, x: torch.Tensor, count: int) -> None:
        """Time some calls, each with the copy used the longest ago."""
        for i in range(-FIRST_CALLS, count):
            call = self.calls[self._next]
            self._next = (self._next + 1) % len(self.calls)
            began = time.perf_counter()
            call(x)
            if i >= 0:
                self.seconds.append(time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured of one shape and number of rows: seconds and bytes by candidate."""

    shape: str
    rows: int
    medians: dict[str, float]
    minima: dict[str, float]
    sizes: dict[str, int]
    bandwidth: list[float]  # bytes a second

    def ratio(self, name: str, to: str) -> str:
        """Give the time of one candidate over another's: of medians, and of minima in brackets."""
        if name not in self.medians or to not in self.medians:
            return "-"
        median = self.medians[name] / self.medians[to]
        return f"**{median:.2f}** ({self.minima[name] / self.minima[to]:.2f})"

    def share(self, name: str) -> str:
        """Give bytes a second as a share of memory's: of medians, and of the best in brackets."""
        size = self.sizes[name]
        median = size / self.medians[name] / statistics.median(self.bandwidth)
        return f"{100 * median:.0f} % ({100 * size / self.minima[name] / max(self.bandwidth):.0f})"

    def milliseconds(self, name: str) -> str:
        """Give the median, and the least in brackets."""
        if name not in self.medians:
            return "-"
        return f"{1e3 * self.medians[name]:.3f} ({1e3 * self.minima[name]:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,4096x11008", help="inputs by outputs")
    parser.add_argument("--rows", default="1,4,16,64,512", help="rows of x")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=float, default=600, help="MB of copies of each candidate")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--plot", type=Path, help="draw it here; needs matplotlib")
    arguments = parser.parse_args()
    machine = describe(arguments.threads)
    torch.set_num_threads(machine.threads)
    if importlib.util.find_spec("gptqmodel") is None:
        say("GPTQModel is left out: this Python does not have it")
    print(f"{machine}\n\nMedians, and minima in brackets.\n")
    cells = []
    for shape in arguments.shapes.split(","):
        inputs, outputs = map(int, shape.split("x"))
        say(f"{shape}: making layers")
        candidates = make(inputs, outputs, arguments.copies * 1e6)
        for rows in map(int, arguments.rows.split(",")):
            say(f"{shape}, {rows} rows")
            cells.append(measure(shape, rows, candidates, arguments.rounds))
    print_tables(cells)
    content = {"machine": asdict(machine), "cells": [asdict(it) for it in cells]}
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=2), encoding="utf-8")
    if arguments.plot:
        from plots import draw_kernels

        draw_kernels(content, arguments.plot)


def make(inputs: int, outputs: int, wanted: float) -> list[Candidate]:
    """Make the candidates for one shape, each with `wanted` bytes of copies."""
    device = find_device("cpu")
    found = []
    for bits in BITS:
        case = Case(bits=bits, group_size=GROUP, rows=inputs, columns=outputs, act_order=False)
        layer, packed, _ = make_layer(case)
        module = CpuKernel().prepare(layer, packed, device)
        size = sum(it.numel() * it.element_size() for it in module.buffers())
        more = (CpuKernel().prepare(layer, packed, device) for _ in range(int(wanted // size)))
        found.append(Candidate(f"cpu {bits}-bit", size, [module, *more]))
        if bits == 4:
            found.append(make_int4(packed, wanted))
            if importlib.util.find_spec("gptqmodel"):
                found.append(make_gptqmodel(packed, wanted))
    weight = torch.randn(outputs, inputs).to(torch.bfloat16)
    size = 2 * inputs * outputs
    weights = [weight.clone() for _ in range(int(wanted // size) + 1)]
    calls: list[Call] = [lambda x, it=it: torch.nn.functional.linear(x, it) for it in weights]
    found.append(Candidate("torch bf16", size, calls))
    return found


def make_int4(packed: PackedLinear, wanted: float) -> Candidate:
    """Make torch's operator for 4-bit weights, as it is."""
    from gptq_loader_kernels.cpu.int4 import Int4Kernel

    inputs, outputs = packed.g_idx.shape[0], packed.qweight.shape[1]
    case = Case(bits=4, group_size=GROUP, rows=inputs, columns=outputs, act_order=False)
    module: Any = Int4Kernel().prepare(make_layer(case)[0], packed, find_device("cpu"))
    words, table = module.words, module.table.view(torch.bfloat16)
    size = words.nbytes + table.nbytes
    copies = [(words.clone(), table.clone()) for _ in range(int(wanted // size) + 1)]
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001 - it has no public name
    calls: list[Call] = [
        lambda x, words=words, table=table: operator(x, words, GROUP, table)
        for words, table in copies
    ]
    return Candidate("torch int4pack", size, calls)


def make_gptqmodel(packed: PackedLinear, wanted: float) -> Candidate:
    """Make GPTQModel's kernel for AVX512-BF16, as it is."""
    with contextlib.redirect_stdout(sys.stderr):  # it greets
        from gptqmodel.extension import op

    name = "int4_qzero_group_scaled_cpu"
    multiply, pack = (
        op(name, "gemm_int4_qzero_group_scaled_cpu_forward"),
        op(name, "pack_gptq_int4"),
    )
    inputs, outputs = packed.g_idx.shape[0], packed.qweight.shape[1]
    zeros = torch.from_numpy(pack_columns(packed.zeros.numpy(), 4, "continuous"))
    order = torch.empty(0, dtype=torch.int32)
    words, table = pack(packed.qweight, zeros, order, outputs, inputs)
    scales = packed.scales.float().contiguous()
    tensors = (words, table, scales)
    size = sum(it.nbytes for it in tensors)
    copies = [[it.clone() for it in tensors] for _ in range(int(wanted // size) + 1)]
    calls: list[Call] = [lambda x, it=it: multiply(x, *it, GROUP, None) for it in copies]
    return Candidate("GPTQModel", size, calls)


def measure(shape: str, rows: int, candidates: list[Candidate], rounds: int) -> Cell:
    """Time every candidate by turns."""
    inputs, outputs = map(int, shape.split("x"))
    x = torch.randn(rows, inputs).to(torch.bfloat16)
    count = max(1, min(CALLS, int(FLOPS / (2 * rows * inputs * outputs))))
    bandwidth = []
    with torch.inference_mode():
        for _ in range(rounds):
            bandwidth.append(CpuKernel().read_bandwidth(MEMORY_BYTES, find_device("cpu")) or 0.0)
            for candidate in candidates:
                candidate.run(x, count)
    return Cell(
        shape,
        rows,
        medians={it.name: statistics.median(it.seconds) for it in candidates},
        minima={it.name: min(it.seconds) for it in candidates},
        sizes={it.name: it.size for it in candidates},
        bandwidth=bandwidth,
    )


def print_tables(cells: list[Cell]) -> None:
    """Print ratios and shares, then milliseconds."""
    print("| shape | rows | 4-bit ÷ int4pack | ÷ GPTQModel | ÷ bf16 |", end="")
    print(" of memory's speed: 2-bit | 3-bit | 4-bit | 8-bit | memory GB/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for cell in cells:
        ratios = [
            cell.ratio("cpu 4-bit", it) for it in ("torch int4pack", "GPTQModel", "torch bf16")
        ]
        shares = [cell.share(f"cpu {bits}-bit") if cell.rows == 1 else "-" for bits in BITS]
        rates = [it / 1e9 for it in cell.bandwidth]
        speed = f"{statistics.median(rates):.1f} ({max(rates):.1f})"
        print(f"| {' | '.join((cell.shape, str(cell.rows), *ratios, *shares, speed))} |")
    names = list(cells[0].medians)
    print(f"\n| shape | rows | {' | '.join(f'{it} ms' for it in names)} |")
    print("|---|---|" + "---|" * len(names))
    for cell in cells:
        times = [cell.milliseconds(it) for it in names]
        print(f"| {' | '.join((cell.shape, str(cell.rows), *times))} |")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
