"""Compile the Triton kernels without tensor cores, for GPUs that are not here, and gate the code.

    python bench/triton_aot_fma.py [--fast] [--jobs N] [--table FILE] [--counts]

A configuration passes where nothing spills, shared memory fits the GPU, every row of words is
loaded 16 bytes a thread, and the main loop has no barrier. Then the instructions that the model of
crossovers stands on (`crossover.py`) are counted anew, those of the tensor-core tiles too, and
compared; `--counts` prints them. Exits 1 where a gate or a count does not hold.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton_aot
from machine_code import range_of
from triton_aot import BITS, DTYPES, SHIFTS

from gptq_loader_kernels.triton.crossover import GPUS, INSTRUCTIONS
from gptq_loader_kernels.triton.shape import unit_rows
from gptq_loader_kernels.triton.tiles import (
    ROW_BUCKETS,
    Kind,
    Tile,
    candidates,
    default_tiles,
    expert_tiles,
    fit_units,
    has_tensor_cores,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# KiB of shared memory a block may ask for; on AMD, of LDS a workgroup has.
SHARED: dict[Kind, int] = {(7, 0): 96, (7, 5): 64}
LDS = 64
ARCHES = ("gfx90a", "gfx942", "gfx1100")
# Whose code is that of another: 4 bits in groups of 128 alone.
SIBLINGS: tuple[Kind, ...] = ((7, 0), "gfx950", "gfx1101", "gfx1102", "gfx1200", "gfx1201")
KINDS: tuple[Kind, ...] = ((7, 5), *ARCHES, *SIBLINGS)
EVERY = (*KINDS, *(it for it in GPUS if it not in KINDS))
OFF = 0.1  # by how much the model's counts may differ from the compiled ones
COLUMNS = 128  # that a program dequantises
ROWS, EXPERTS = 2048, 256  # that a program sorts: of 256 tokens with eight experts each
BEGIN, END = "<!-- without tensor cores: begin -->", "<!-- without tensor cores: end -->"
LABEL = re.compile(r"^(?:\$L__|\.L)(BB0_\w+):")
BRANCH = re.compile(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\s+(?:\$L__|\.L)(BB0_\w+)")
VECTORS = ("ld.global.v4.b32", "global_load_dwordx4", "global_load_b128", "buffer_load_dwordx4")
BARRIERS = ("bar.sync", "barrier.sync", "s_barrier")
FLOATS = ("FFMA", "FADD", "FMUL", "FSEL")  # at half the rate of the others before sm80


@dataclass(frozen=True, slots=True)
class Job:
    """One machine code to make.

    Attributes:
        kind: of the GPU.
        bits: the width of a code.
        shift: the group size's logarithm.
        tile: the tile; None to dequantise.
        dtype: of x, or of the dequantised weight.
        scales: the scales' dtype.
        split: whether it writes partial sums.
        even: whether the layer's sizes are whole blocks.
        experts: whether rows are of a mixture's experts.
        sorts: whether it sorts such rows, and multiplies nothing.
    """

    kind: Kind
    bits: int
    shift: int
    tile: Tile | None
    dtype: str = "fp16"
    scales: str = "fp16"
    split: bool = True
    even: bool = True
    experts: bool = False
    sorts: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """What came of it.

    Attributes:
        job: what was asked.
        registers: of a thread.
        spilled: bytes of a thread's registers that went to memory.
        shared: bytes of shared memory of a block.
        vectors: loads of 16 bytes in the main loop.
        slots: that a weight takes in the main loop: its instructions, or twice its floats.
        faults: the gates it violates.
    """

    job: Job
    registers: int
    spilled: int
    shared: int
    vectors: int
    slots: float
    faults: tuple[str, ...]


def tiles_of(kind: Kind, bits: int) -> list[Tile]:
    """List every tile that a GPU may take for a width, once: `waves` changes no code."""
    found = (replace(it, waves=0) for most in ROW_BUCKETS for it in candidates(kind, bits, most))
    return list(dict.fromkeys(found))


def jobs(*, fast: bool) -> Iterator[Job]:
    """List what can be chosen: all of it, or a default of each kind."""
    if fast:
        yield Job((7, 5), 4, 7, tiles_of((7, 5), 4)[0])
        yield Job((7, 0), 3, 5, tiles_of((7, 0), 3)[-2], "bf16", "bf16")
        yield Job("gfx942", 8, 7, tiles_of("gfx942", 8)[0], even=False)
        yield Job("gfx1100", 4, 6, None)
        yield Job((9, 0), 4, 7, expert_tiles((9, 0), 4)[0], experts=True)
        yield Job((8, 0), 4, 7, expert_tiles((8, 0), 4)[-1], experts=True, sorts=True)
        return
    for kind, bits in product(KINDS, BITS):
        if kind in SIBLINGS and bits != 4:
            continue
        sizes = (7,) if kind in SIBLINGS else SHIFTS
        for tile in tiles_of(kind, bits):
            for shift in sizes:
                if shift in (4, 7) or fit_units(tile, bits, shift) != fit_units(
                    tile, bits, shift - 1
                ):
                    yield Job(kind, bits, shift, tile)
            yield Job(kind, bits, sizes[0], tile, "bf16", "bf16")
            if bits == 4 and kind not in SIBLINGS:
                yield Job(kind, bits, 7, tile, "fp16", "fp32")
                yield Job(kind, bits, 7, tile, "bf16", "bf16", split=False, even=False)
    yield from expert_jobs()
    for kind, bits in product(EVERY, BITS):
        yield Job(kind, bits, 7, None)
        yield Job(kind, bits, 4, None, "bf16", "fp32")


def expert_jobs() -> Iterator[Job]:
    """List what mixtures' experts are multiplied by."""
    for kind, bits in product(EVERY, BITS):
        for tile in dict.fromkeys(replace(it, waves=0) for it in expert_tiles(kind, bits)):
            yield Job(kind, bits, 7, tile, experts=True)
            yield Job(kind, bits, 5, tile, "bf16", "bf16", experts=True)
    for kind in EVERY:
        yield Job(kind, 4, 7, replace(expert_tiles(kind, 4)[-1], waves=0), experts=True, sorts=True)


def make(job: Job) -> Made:
    """Compile one, and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gptq_loader_kernels.triton import fma
    from gptq_loader_kernels.triton.operator import SCALES

    tile, unit = job.tile, unit_rows(job.bits)
    types = {"words": "*i32", "table": "*i32", "K": "i32", "N": "i32", "S": "i32"}
    types["GROUP_SHIFT"] = "i32"
    values: dict[str, Any] = {"BITS": job.bits, "SCALES": SCALES[DTYPES[job.scales]]}
    if tile is None:
        kernel, warps, varying = fma.dequantize, 4, ("GROUP_SHIFT",)
        types["weight"] = f"*{job.dtype}"
        values |= {"BLOCK_N": COLUMNS, "SPAN": min(1 << job.shift, unit)}
        block_n, depth = COLUMNS, unit
    elif job.sorts:
        kernel, warps, varying, types = fma.sort_by_expert, 4, ("P",), {}
        types = {"experts": "*i64", "order": "*i32", "of_tiles": "*i64", "P": "i32"}
        values = {"BLOCK_P": ROWS, "BLOCK_E": EXPERTS, "BLOCK_M": tile.block_m}
        block_n, depth = COLUMNS, unit
    else:
        kernel, warps, varying = fma.multiply_rows, tile.warps, tuple(fma.VARYING)
        depth, span = fit_units(tile, job.bits, job.shift)
        block_n = tile.block_n
        types |= {
            "x": "*i32", "bias": "*fp32", "y": "*fp32" if job.split else f"*{job.dtype}",
            "M": "i32", "STEPS": "i32", "PARTS": "i32",
        }  # fmt: skip
        if job.experts:
            types |= {"experts": "*i64", "WORDS": "i32", "TABLE": "i32", "SHARED": "i32"}
            types |= {"order": "*i32"} if tile.block_m > 1 else {}
        values |= {
            "BLOCK_M": tile.block_m, "BLOCK_N": block_n, "BLOCK_K": depth, "SPAN": span,
            "DTYPE": SCALES[DTYPES[job.dtype]], "EVEN": job.even, "BIAS": not job.split,
            "EXPERTS": job.experts, "SORTED": job.experts and tile.block_m > 1,
        }  # fmt: skip
    names: list[str] = kernel.arg_names
    width = 64 if isinstance(job.kind, str) and job.kind.startswith("gfx9") else 32
    target = (
        GPUTarget("hip", job.kind, width)
        if isinstance(job.kind, str)
        else GPUTarget("cuda", job.kind[0] * 10 + job.kind[1], width)
    )
    made = triton.compile(
        ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in names},
            {(names.index(name),): value for name, value in values.items()},
            {(names.index(it),): [["tt.divisibility", 16]] for it in types if it not in varying},
        ),
        target=target,
        options={"num_warps": warps, "num_stages": 1},
    )
    threads = warps * width
    text = made.asm["amdgcn" if isinstance(job.kind, str) else "ptx"]
    multiplies = tile is not None and not job.sorts
    loop = _loop(text) if multiplies else text.splitlines()
    registers, spilled, slots = (
        _amd(text, loop) if isinstance(job.kind, str) else _nvidia(made.asm["cubin"], job.kind)
    )
    vectors = sum(any(it in line for it in VECTORS) for line in loop)
    wanted = -(-depth // unit) * (24 if job.bits == 3 else 8) * block_n / (threads * 4)
    limit = SHARED.get(job.kind, LDS if isinstance(job.kind, str) else 99) << 10
    faults = (
        (spilled > 0, f"{spilled} bytes spilled"),
        (made.metadata.shared > limit, f"{made.metadata.shared} bytes of shared memory"),
        (not job.sorts and vectors < max(wanted, 1), f"{vectors} loads of 16 bytes, not {wanted}"),
        (
            multiplies and any(it in line for line in loop for it in BARRIERS),
            "a barrier in the loop",
        ),
    )
    return Made(
        job, registers, spilled, made.metadata.shared, vectors,
        slots * threads / (block_n * depth), tuple(words for wrong, words in faults if wrong),
    )  # fmt: skip


def _loop(text: str) -> list[str]:
    """Take the longest loop out of PTX, or of AMD's assembly."""
    code = text.splitlines()
    labels = {match[1]: i for i, line in enumerate(code) if (match := LABEL.match(line))}
    loops = [
        code[labels[match[1]] : i]
        for i, line in enumerate(code)
        if (match := BRANCH.search(line)) and labels.get(match[1], i) < i
    ]
    return max(loops, key=len, default=[])


def _amd(text: str, loop: list[str]) -> tuple[int, int, float]:
    """Take registers, spilled bytes and the loop's vector instructions from the assembly."""
    found = re.search(r"; TotalNumVgprs: (\d+)|; NumVgprs: (\d+)", text)
    scratch = re.search(r"; ScratchSize: (\d+)", text)
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    if found is None or scratch is None or spilled is None:
        raise ValueError(text[-2000:])
    vector = sum(bool(re.match(r"\s+(v|global|buffer|ds)_", line)) for line in loop)
    registers = int(found[1] or found[2])
    return registers, int(scratch[1]) + 4 * int(spilled[1]), float(vector)


def _nvidia(cubin: bytes, kind: tuple[int, int]) -> tuple[int, int, float]:
    """Take registers, local memory and the loop's slots from machine code."""
    # Triton's disassembler no longer knows sm70, whose code is counted as sm75's.
    counted = kind != (7, 0)
    registers, local, loop = triton_aot.read(cubin, disassembled=counted)
    floats = sum(loop[it] for it in FLOATS)
    return registers, local, float(max(loop.total(), 2 * floats if kind < (8, 0) else 0))


def counts(made: list[Made]) -> dict[Kind, dict[int, float]]:
    """Take what the model of crossovers stands on: slots a weight, by kind and width."""
    found: dict[Kind, dict[int, float]] = {}
    for it in made:
        job = it.job
        if job.tile is None or job.kind not in GPUS:
            continue
        usual = replace(default_tiles(job.kind, job.bits)[-1], waves=0)
        if job == Job(job.kind, job.bits, 7, usual):
            found.setdefault(job.kind, {})[job.bits] = it.slots
    return found


def tensor_counts(pool: ProcessPoolExecutor) -> dict[Kind, dict[int, float]]:
    """Compile the tensor-core tiles that the model stands on, and count theirs."""
    wanted = [
        (kind, triton_aot.Job(kind[0] * 10 + kind[1], bits, 7, default_tiles(kind, bits)[-1]))
        for kind, bits in product(GPUS, BITS)
        if not isinstance(kind, str) and has_tensor_cores(kind)
    ]
    found: dict[Kind, dict[int, float]] = {}
    for (kind, job), it in zip(
        wanted, pool.map(triton_aot.make, [job for _, job in wanted]), strict=True
    ):
        threads = job.tile.warps * 32
        weight = it.instructions * threads / (job.tile.block_n * it.depth)
        found.setdefault(kind, {})[job.bits] = weight
    return found


def name_of(kind: Kind) -> str:
    """Name a kind as users do."""
    return kind if isinstance(kind, str) else f"sm{kind[0]}{kind[1]}"


def table(made: list[Made]) -> str:
    """Write a row for each GPU and tile: the range over widths, group sizes and dtypes."""
    lines = [
        "| GPU | tile | warps | made | registers | KiB | 16-byte loads | slots a weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds: dict[tuple[Any, ...], list[Made]] = {}
    for it in made:
        job = it.job
        kinds.setdefault((job.kind, job.tile, job.experts, job.sorts), []).append(it)
    for (kind, tile, experts, sorts), group in kinds.items():
        usual = next((it for it in group if it.job.bits == 4 and it.job.shift == 7), group[0])
        shape = "dequantise" if tile is None else f"{tile.block_m} x {tile.block_n}"
        shape = "sort by expert" if sorts else f"{shape}, experts" if experts else shape
        slots = "" if tile is None or sorts or kind == (7, 0) else f"{usual.slots:.1f}"
        lines.append(
            f"| {name_of(kind)} | {shape} | {4 if tile is None else tile.warps} | {len(group)} "
            f"| {range_of([it.registers for it in group])} "
            f"| {range_of([it.shared / 1024 for it in group])} "
            f"| {usual.vectors} ({range_of([it.vectors for it in group])}) | {slots} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="a few configurations, in seconds")
    parser.add_argument("--gpu", action="append", help="only this kind: sm75, gfx942, ...")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--counts", action="store_true", help="print the model's counts")
    parser.add_argument("--table", type=Path, help="put the table between the marks of this file")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    wanted = [
        it for it in jobs(fast=options.fast) if not options.gpu or name_of(it.kind) in options.gpu
    ]
    made: list[Made] = []
    counted: dict[Kind, dict[int, float]] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        for it in pool.map(make, wanted):
            made.append(it)
            if it.faults:
                print(f"{it.job}: {', '.join(it.faults)}", flush=True)
        if not options.fast and not options.gpu:
            counted = counts(made) | tensor_counts(pool)
            counted[7, 0] = counted[7, 5]
    faulty = sum(bool(it.faults) for it in made)
    rows = table(made)
    print(rows)
    print(f"\n{len(made)} configurations, {faulty} of them against a gate")
    if options.counts:
        for kind, by_bits in counted.items():
            print(f"    {kind!r}: { ({bits: round(it, 1) for bits, it in by_bits.items()}) },")
    wrong = [
        f"crossover.py has {INSTRUCTIONS.get(kind, {}).get(bits)} for {name_of(kind)} at {bits} "
        f"bits; compiled are {slots:.1f}"
        for kind, by_bits in counted.items()
        for bits, slots in by_bits.items()
        if abs(INSTRUCTIONS.get(kind, {}).get(bits, 0) - slots) > OFF * slots
    ]
    print("\n".join(wrong))
    if options.table and not faulty:
        page = options.table.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        options.table.write_text(f"{before}{BEGIN}\n{rows}\n{END}{after}", encoding="utf-8")
    return 1 if faulty or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
