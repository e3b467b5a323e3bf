"""Compile the kernels of a decode step for GPUs that are not here, and gate the result.

    python bench/attention_aot.py [--fast] [--gpu NAME] [--jobs N] [--table FILE]

A configuration passes where nothing spills, shared memory fits the GPU, heads' numbers are loaded
16 bytes at a time where a thread has as many (a warp of gfx9 is of 64 threads, which load half a
KiB by 8 bytes each), and the tensor core's opcode is there where the tile says so. Exits 1 where
one does not. `--table` rewrites the part of docs/kernels/attention.md between its marks.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine_code import range_of, run_tool

from gptq_loader_kernels.attention.tiles import (
    CHUNK,
    COLUMNS,
    MAX_SPLITS,
    Tile,
    norm_warps,
    power_of_two,
    tile_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# Shared memory one block may ask for, KiB, and the threads of a warp: CUDA C++ Programming Guide,
# compute capabilities; AMD's ISA guides.
SHARED = {
    "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227,
    "sm_120": 99, "gfx90a": 64, "gfx942": 64, "gfx1100": 64,
}  # fmt: skip
CORES = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma", "v_wmma")
WIDE = re.compile(r"(?:LDG|LDGSTS)\.\S*128\b|(?:global|buffer)_load_(?:dwordx4|b128)")
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4, "i8": 1, "fp8e4nv": 1}
VARYING = ("scale", "window", "softcap", "table_stride", "eps", "scale_slot", "slots_stride")
SHAPES = (  # query heads of a head of keys, and the dimensions of keys and values
    (1, 64, 64), (1, 80, 80), (1, 128, 128), (1, 256, 256), (2, 128, 128), (4, 64, 64),
    (4, 96, 96), (4, 128, 128), (7, 128, 128), (8, 64, 64), (8, 128, 128), (4, 256, 256),
    (16, 192, 128), (71, 64, 64),
)  # fmt: skip
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", re.MULTILINE)
AMD_OPCODE = re.compile(r"^\s+([a-z]+_\w+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Job:
    """One machine code to make.

    Attributes:
        gpu: a key of SHARED.
        kernel: its name.
        group: query heads of a head of keys; for other kernels than attention, the row's size.
        dim: of keys.
        value_dim: of values.
        dtype: of the query.
        cache: the caches' dtype.
        block_size: positions of a block.
        extras: whether there are sinks and a softcap, or the norms of a style.
    """

    gpu: str
    kernel: str
    group: int
    dim: int = 128
    value_dim: int = 128
    dtype: str = "fp16"
    cache: str = "fp16"
    block_size: int = 16
    extras: bool = False

    @property
    def amd(self) -> bool:
        """Whether the GPU is AMD's."""
        return self.gpu.startswith("gfx")


@dataclass(frozen=True, slots=True)
class Made:
    """What came of it.

    Attributes:
        job: what was compiled.
        registers: of a thread.
        shared: bytes of shared memory of a block.
        cores: instructions of tensor cores.
        faults: the gates it violates.
    """

    job: Job
    registers: int
    shared: int
    cores: int
    faults: tuple[str, ...]


def tile(job: Job) -> Tile:
    cores = job.gpu != "sm_75" and job.dtype != "fp32"
    return tile_of(job.group, max(job.dim, job.value_dim), cores=cores, amd=job.amd)


def jobs(*, fast: bool) -> Iterator[Job]:
    """List what a decode step may launch: all of it, or one of each kind."""
    if fast:
        yield Job("sm_80", "attend", 4)
        yield Job("sm_75", "attend", 4, cache="i8")
        yield Job("sm_120", "attend", 1, 80, 80, "bf16", "bf16")
        yield Job("gfx1100", "attend", 8, 64, 64)
        yield Job("sm_90", "rotary_and_cache", 8, cache="i8", extras=True)
        yield Job("sm_86", "norm", 4096, extras=True)
        return
    for gpu in SHARED:
        for shape in SHAPES:
            yield Job(gpu, "attend", *shape)
            yield Job(gpu, "attend", *shape, "bf16", "i8")
        for shape in SHAPES[2:10:2]:  # the same code but for an opcode, or conversions
            yield Job(gpu, "attend", *shape, "bf16", "bf16")
            yield Job(gpu, "attend", *shape, "fp32", "fp32")
        yield Job(gpu, "attend", 4, block_size=64, extras=True)
        yield Job(gpu, "attend", 1, block_size=64, extras=True)
        if gpu in {"sm_89", "sm_90", "sm_100", "sm_120"}:
            yield Job(gpu, "attend", 4, cache="fp8e4nv")
        yield Job(gpu, "combine", 4)
        for dtype, extras in (("fp16", False), ("bf16", True)):
            yield Job(gpu, "activation_and_mul", 11008, dtype=dtype, extras=extras)
            for cache_dtype in (dtype, "i8"):
                yield Job(gpu, "rotary_and_cache", 8, 128, 128, dtype, cache_dtype, extras=extras)
            for size in (2048, 8192):
                yield Job(gpu, "norm", size, dtype=dtype, extras=extras)


def make(job: Job) -> Made:
    """Compile one, and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, values, options = (
        _attention(job) if job.kernel in {"attend", "combine"} else _other(job)
    )
    names: list[str] = kernel.arg_names
    types = {it: _type(job, it) for it in names if it not in values}
    source = ASTSource(
        kernel,
        {it: types.get(it, "constexpr") for it in names},
        {(names.index(it),): value for it, value in values.items()},
        {(names.index(it),): [["tt.divisibility", 16]] for it in types if it not in VARYING},
    )
    warp = 64 if job.gpu.startswith("gfx9") else 32
    target = GPUTarget(*(("hip", job.gpu) if job.amd else ("cuda", int(job.gpu[3:]))), warp)
    made = triton.compile(source, target=target, options=options)
    registers, spilled, counted = (
        _amd(made.asm["amdgcn"]) if job.amd else _nvidia(made.asm["cubin"])
    )
    cores = sum(count for it, count in counted.items() if it.startswith(CORES))
    wide = sum(count for it, count in counted.items() if WIDE.match(it))
    promised = job.kernel == "attend" and tile(job).cores
    expects_wide = _loaded_bytes(job) >= 16 * warp * options.get("num_warps", 4)
    faults = (
        (spilled > 0, f"{spilled} bytes or registers spilled"),
        (made.metadata.shared > SHARED[job.gpu] << 10, f"{made.metadata.shared} bytes shared"),
        (promised and not cores, "no tensor cores"),
        (expects_wide and not wide, "no loads of 16 bytes"),
    )
    return Made(
        job, registers, made.metadata.shared, cores, tuple(text for wrong, text in faults if wrong)
    )


def _loaded_bytes(job: Job) -> int:
    """Count the bytes of heads or of a row that all threads of a program load at a time."""
    if job.kernel == "norm":
        return job.group * ITEMSIZE[job.dtype]
    if job.kernel == "activation_and_mul":
        return COLUMNS * ITEMSIZE[job.dtype]
    head = job.dim * ITEMSIZE[job.cache]
    return tile(job).positions * head if job.kernel == "attend" and head % 16 == 0 else 0


def _attention(job: Job) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from gptq_loader_kernels.attention import decode

    it = tile(job)
    sizes = {
        "DV": job.value_dim, "DV_PAD": power_of_two(job.value_dim), "SPLITS": 16, "CHUNK": CHUNK,
        "POSITIONS": it.positions,
    }  # fmt: skip
    if job.kernel == "combine":
        return decode.combine, {**sizes, "MAX_SPLITS": MAX_SPLITS}, {"num_warps": 4}
    kernel = decode.attend_by_cores if it.cores else decode.attend_by_lanes
    values = {
        **sizes, "GROUP": job.group, "D": job.dim, "D_PAD": power_of_two(job.dim),
        "BLOCK_SIZE": job.block_size, "ROWS": it.rows, "STAGES": it.stages,
        "EIGHT": ITEMSIZE[job.cache] == 1, "SOFTCAP": job.extras, "SINKS": job.extras,
        "INTERPRETED": False, "PACKED": not job.amd,
    }  # fmt: skip
    return kernel, values, {"num_warps": it.warps, "num_stages": it.stages}


def _other(job: Job) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from gptq_loader_kernels.attention import elementwise

    exact = {"enable_fp_fusion": False}
    if job.kernel == "norm":
        values = {
            "STYLE": "gemma" if job.extras else "llama", "ADDS": job.extras, "POST": job.extras,
            "BLOCK": power_of_two(job.group),
        }  # fmt: skip
        return elementwise.norm, values, {"num_warps": norm_warps(job.group), **exact}
    if job.kernel == "activation_and_mul":
        return elementwise.activation_and_mul, {"SILU": job.extras, "BLOCK": COLUMNS}, exact
    values = {
        "HEADS": 32, "KV_HEADS": job.group, "D": job.dim, "DV": job.value_dim, "R": job.dim // 2,
        "D_PAD": power_of_two(job.dim), "DV_PAD": power_of_two(job.value_dim),
        "BLOCK_SIZE": job.block_size, "ROTATES": True, "INTERLEAVED": job.extras,
        "QUERY_NORM": job.extras, "KEY_NORM": job.extras, "STYLE": "llama",
        "LIMIT": 127.0 if job.cache == "i8" else 0.0, "WHOLE_CODES": job.cache == "i8",
    }  # fmt: skip
    return elementwise.rotary_and_cache, values, {"num_warps": 1, **exact}


def _type(job: Job, name: str) -> str:
    if name in {"key_cache", "value_cache"}:
        return f"*{job.cache}"
    known = {
        "key_scales": "*fp16", "value_scales": "*fp16", "tables": "*i32", "lengths": "*i32",
        "parts": "*fp32", "stats": "*fp32", "slots": "*i64", "scale": "fp32", "softcap": "fp32",
        "eps": "fp32", "window": "i32", "D": "i32", "I": "i32",
    }  # fmt: skip
    if name in known:
        return known[name]
    whole = name.endswith(("_stride", "_head", "_block", "_slot", "_column"))
    return "i32" if whole else f"*{job.dtype}"


def _nvidia(cubin: bytes) -> tuple[int, int, Counter[str]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = run_tool("cuobjdump", "--dump-resource-usage", str(file))
        code = run_tool("nvdisasm", "-c", str(file))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(usage)
    return int(found[1]), int(found[2]) + int(found[3]), Counter(OPCODE.findall(code))


def _amd(code: str) -> tuple[int, int, Counter[str]]:
    registers = re.search(r"\.vgpr_count:\s*(\d+)", code)
    spills = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", code)
    if registers is None or not spills:
        raise ValueError(code[-2000:])
    return int(registers[1]), sum(map(int, spills)), Counter(AMD_OPCODE.findall(code))


def table(made: list[Made]) -> str:
    """Write a row for each GPU and kind of kernel."""
    lines = [
        "| GPU | kernel | made | registers | KiB shared | tensor cores |",
        "|---|---|---|---|---|---|",
    ]
    kinds: dict[tuple[str, str], list[Made]] = {}
    for it in made:
        kind = it.job.kernel
        if kind == "attend":
            kind = "attention, tensor cores" if tile(it.job).cores else "attention, lanes"
        kinds.setdefault((it.job.gpu, kind), []).append(it)
    for (gpu, kind), group in kinds.items():
        shared = range_of([it.shared / 1024 for it in group])
        lines.append(
            f"| {gpu} | {kind.replace('_', ' ')} | {len(group)} "
            f"| {range_of([it.registers for it in group])} | {shared} of {SHARED[gpu]} "
            f"| {range_of([it.cores for it in group])} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="a few configurations, in seconds")
    parser.add_argument("--gpu", action="append", choices=list(SHARED), help="only this one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--table", type=Path, help="put the table between the marks of this file")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # what Triton does unset, today; it will change
    chosen = [it for it in jobs(fast=options.fast) if it.gpu in (options.gpu or SHARED)]
    made: list[Made] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for it in pool.map(make, chosen):
            made.append(it)
            if it.faults:
                print(f"{it.job}: {', '.join(it.faults)}", flush=True)
    faulty = sum(bool(it.faults) for it in made)
    rows = table(made)
    print(rows)
    print(f"\n{len(made)} configurations, {faulty} of them against a gate")
    if options.table and not faulty:
        page = options.table.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        options.table.write_text(f"{before}{BEGIN}\n{rows}\n{END}{after}", encoding="utf-8")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
