"""Compile every Triton tile that can be chosen, for GPUs that are not here, and gate the result.

    python bench/triton_aot.py [--fast] [--jobs N] [--json FILE] [--table FILE]

A configuration passes where nothing spills, shared memory fits the GPU, the tensor core's opcode is
in the main loop, and a step of the loop issues no more asynchronous loads than CEILING. Exits 1
where one does not. `--table` rewrites the part of docs/kernels/triton.md between its marks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine_code import range_of, run_tool

from gptq_loader_kernels.triton.tiles import BUCKETS, Tile, candidates, fit

if TYPE_CHECKING:
    from collections.abc import Iterator

# Shared memory one block may ask for (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
OPCODES = ("HMMA", "HGMMA", "UTCHMMA")  # Ampere's and consumer GPUs', Hopper's, Blackwell's
CEILING = 32  # asynchronous loads a thread issues in a step of the loop
BITS = (2, 3, 4, 8)
SHIFTS = (4, 5, 6, 7, 8)  # groups of 16 to 256 rows; larger ones, and none, are as those of 256
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
VARYING = ("M", "TILES", "PARTS", "GROUP_SHIFT", "EXPONENT")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
LABEL = re.compile(r"\s*(\.L_x_\d+):")
BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Job:
    """One machine code to make.

    Attributes:
        capability: of the GPU.
        bits: the width of a code.
        shift: the group size's logarithm.
        tile: the tile.
        dtype: of x.
        scales: the scales' dtype.
        split: whether it writes partial sums.
    """

    capability: int
    bits: int
    shift: int
    tile: Tile
    dtype: str = "fp16"
    scales: str = "fp16"
    split: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """What came of it; counts are of the main loop, for one warp and one step.

    Attributes:
        job: what was asked.
        depth: rows of the weight in a step.
        registers: of a thread.
        stack: bytes of local memory of a thread, spills among them.
        shared: bytes of shared memory of a block.
        opcode: the tensor core's, and how many.
        loads: asynchronous loads.
        instructions: all of them.
        faults: the gates it violates.
    """

    job: Job
    depth: int
    registers: int
    stack: int
    shared: int
    opcode: str
    loads: int
    instructions: int
    faults: tuple[str, ...]


def tiles_of(capability: int, bits: int) -> list[Tile]:
    """List every tile that a GPU may take for a width, once."""
    found = (it for most in BUCKETS for it in candidates(divmod(capability, 10), bits, most))
    return list(dict.fromkeys(found))


def jobs(*, fast: bool) -> Iterator[Job]:
    """List what can be chosen: all of it, or a default of each kind."""
    if fast:
        yield Job(80, 4, 7, tiles_of(80, 4)[0])
        yield Job(86, 3, 5, Tile(64, 128, 128, 8, 3), "bf16", "bf16")
        yield Job(90, 8, 8, Tile(128, 128, 64, 8, 3))
        yield Job(120, 2, 6, Tile(16, 64, 128, 4, 4, 4), split=True)
        return
    for capability, bits in product(SHARED, BITS):
        for tile in tiles_of(capability, bits):
            for shift, dtype in product(SHIFTS, ("fp16", "bf16")):
                if fit(tile, bits, shift) != fit(tile, bits, shift - 1):  # else the same code
                    yield Job(capability, bits, shift, tile, dtype, dtype)
            if bits == 4:  # what differs in a line before or after the loop: once for each tile
                yield Job(capability, bits, 7, tile, "bf16", "fp16")
                yield Job(capability, bits, 7, tile, "fp16", "fp32")
                if tile.waves:
                    yield Job(capability, bits, 7, tile, split=True)


def make(job: Job) -> Made:
    """Compile one, and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gptq_loader_kernels.triton.matmul import multiply
    from gptq_loader_kernels.triton.operator import SCALES

    depth, span = fit(job.tile, job.bits, job.shift)
    names: list[str] = multiply.arg_names
    types = {
        "x": f"*{job.dtype}", "words": "*i32", "table": "*i32", "bias": "*fp32",
        "y": "*fp32" if job.split else f"*{job.dtype}", "M": "i32", "N": "i32", "K": "i32",
        "S": "i32", "TILES": "i32", "PARTS": "i32", "GROUP_SHIFT": "i32", "EXPONENT": "i32",
    }  # fmt: skip
    values: dict[str, Any] = {
        "BITS": job.bits, "BLOCK_M": job.tile.block_m, "BLOCK_N": job.tile.block_n,
        "BLOCK_K": depth, "SPAN": span, "SCALES": SCALES[DTYPES[job.scales]],
        "STAGES": job.tile.stages, "BIAS": not job.split,
        "INTERPRETED": False,
    }  # fmt: skip
    source = ASTSource(
        multiply,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in values.items()},
        {(names.index(it),): [["tt.divisibility", 16]] for it in types if it not in VARYING},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", job.capability, 32),
        options={"num_warps": job.tile.warps, "num_stages": job.tile.stages},
    )
    registers, stack, loop = read(made.asm["cubin"])
    opcode = next((it for it in OPCODES if loop[it]), "")
    limit = SHARED[job.capability] << 10
    faults = (
        (stack > 0, f"{stack} bytes of local memory"),
        (made.metadata.shared > limit, f"{made.metadata.shared} bytes of shared memory"),
        (not opcode, "no tensor cores"),
        (loop["LDGSTS"] > CEILING, f"{loop['LDGSTS']} asynchronous loads"),
    )
    return Made(
        job, depth, registers, stack, made.metadata.shared, f"{loop[opcode]} {opcode}",
        loop["LDGSTS"], loop.total(), tuple(words for wrong, words in faults if wrong),
    )  # fmt: skip


def read(cubin: bytes, *, disassembled: bool = True) -> tuple[int, int, Counter[str]]:
    """Take registers, local memory and, disassembled, the main loop's instructions of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "multiply.cubin"
        file.write_bytes(cubin)
        usage = run_tool("cuobjdump", "--dump-resource-usage", str(file))
        code = run_tool("nvdisasm", "-c", str(file)).splitlines() if disassembled else []
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(usage)
    labels = {match[1]: i for i, line in enumerate(code) if (match := LABEL.match(line))}
    loops = [
        code[labels[match[1]] : i]
        for i, line in enumerate(code)
        if (match := BRANCH.search(line)) and labels.get(match[1], i) < i
    ]
    cores = [loop for loop in loops if any(it in "\n".join(loop) for it in OPCODES)]
    longest = max(cores or loops or [code], key=len)
    counted = Counter(OPCODE.findall("\n".join(longest)))
    return int(found[1]), int(found[2]) + int(found[3]), counted


def table(made: list[Made]) -> str:
    """Write a row for each GPU and tile: the range over widths, group sizes and dtypes."""
    lines = [
        "| GPU | tile | warps, stages | made | registers | KiB | cores | loads | instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kinds: dict[tuple[int, Tile], list[Made]] = {}
    for it in made:
        kinds.setdefault((it.job.capability, it.job.tile), []).append(it)
    for (capability, tile), group in kinds.items():
        usual = next((it for it in group if it.job.bits == 4 and it.job.shift == 7), group[0])
        shared = range_of([it.shared / 1024 for it in group])
        lines.append(
            f"| sm{capability} | {tile.block_m} x {tile.block_n} x {tile.block_k} "
            f"| {tile.warps}, {tile.stages} | {len(group)} "
            f"| {range_of([it.registers for it in group])} "
            f"| {shared} of {SHARED[capability]} | {usual.opcode} "
            f"| {usual.loads} ({range_of([it.loads for it in group])}) | {usual.instructions} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="a few configurations, in seconds")
    parser.add_argument(
        "--gpu", type=int, action="append", help="only this capability: 80, 90, ..."
    )
    parser.add_argument("--bits", type=int, action="append", help="only this width: 2, 3, 4, 8")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", type=Path, help="write every configuration here")
    parser.add_argument("--table", type=Path, help="put the table between the marks of this file")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # what Triton does unset, today; it will change
    wanted = [
        it
        for it in jobs(fast=options.fast)
        if it.capability in (options.gpu or SHARED) and it.bits in (options.bits or BITS)
    ]
    made: list[Made] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for it in pool.map(make, wanted):
            made.append(it)
            if it.faults:
                print(f"{it.job}: {', '.join(it.faults)}", flush=True)
    faulty = sum(bool(it.faults) for it in made)
    rows = table(made)
    print(rows)
    print(f"\n{len(made)} configurations, {faulty} of them against a gate")
    if options.json:
        data = [_plain(it) for it in made]
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    if options.table and not faulty:
        page = options.table.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        options.table.write_text(f"{before}{BEGIN}\n{rows}\n{END}{after}", encoding="utf-8")
    return 1 if faulty else 0


def _plain(made: Made) -> dict[str, Any]:
    from dataclasses import asdict

    data = asdict(made)
    return {**data.pop("job"), **data}


if __name__ == "__main__":
    sys.exit(main())
