"""The Triton kernel: truthful answers, right products, and real machine code, all without a GPU."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
from processes import run_process

from gptq_loader_kernels.triton import TritonKernel
from gptq_loader_kernels.triton.crossover import GPUS, INSTRUCTIONS, NEVER, default_crossover
from gptq_loader_kernels.triton.layout import lay_out
from gptq_loader_kernels.triton.shape import Shape
from gptq_loader_kernels.triton.tiles import (
    BUCKETS,
    ROW_BUCKETS,
    buckets,
    candidates,
    default_tiles,
)
from gptq_loader_kernels.triton.tuning import chosen_crossover, chosen_tiles, tuned_file
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device
from gptq_loader_plugin.kernel import Accepted, Declined, Tunable

AMPERE = Device("cuda", capability=(8, 6), present=False)
RDNA = Device("rocm", arch="gfx1100", present=False)
TURING = Device("cuda", capability=(7, 5), present=False)
ARCHES = "gfx90a, gfx942, gfx950, gfx1100, gfx1101, gfx1102, gfx1200 or gfx1201"
CASES = [
    *(
        (Case(bits=bits, group_size=group), AMPERE, None)
        for bits in (2, 3, 4, 8)
        for group in (-1, 16, 32, 64, 96, 128)
    ),
    (Case(rows=576), AMPERE, None),  # a short last group
    (Case(columns=100), AMPERE, None),
    (Case(), Device("cuda", capability=(9, 0), present=False), None),
    (Case(), Device("cuda", capability=(12, 0), present=False), None),
    *((Case(bits=bits), TURING, None) for bits in (2, 3, 4, 8)),
    (Case(), Device("cuda", capability=(7, 0), present=False), None),
    (Case(), Device("cuda", capability=(6, 1), present=False), "needs sm70 or newer, which Triton "
     "compiles for; this is cuda sm61"),
    *((Case(), Device("rocm", arch=it, present=False), None)
      for it in ("gfx90a", "gfx942", "gfx1100", "gfx1201")),
    (Case(), Device("rocm", arch="gfx1030", present=False),
     f"needs {ARCHES}; this is rocm gfx1030"),
    (Case(), Device("cpu"), "needs a CUDA or ROCm GPU; this is cpu"),
    (Case(bits=7, layout="planar"), AMPERE, "7-bit; Triton decodes 2, 3, 4 and 8 bits"),
    (Case(group_size=8), AMPERE, "groups of 8 rows; Triton takes multiples of 16"),
    (Case(rows=40, group_size=-1), AMPERE, "40 inputs; Triton takes multiples of 32"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "device", "words"), CASES, ids=lambda it: str(it)[:48])
def test_it_answers_truthfully(
    case: Case, device: Device, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    verdict = TritonKernel().consider(make_layer(case)[0], device)
    if words is None:
        assert isinstance(verdict, Accepted)
    else:
        assert verdict == Declined("triton", words)
        assert len(words) <= 100


@pytest.mark.parametrize(
    ("device", "dtype", "rank", "how"),
    [
        (AMPERE, "bfloat16", 60, "decoded inside the matmul"),
        (TURING, "float16", 50, "multiplied without tensor cores"),
        (RDNA, "bfloat16", 60, "multiplied without tensor cores"),
    ],
    ids=str,
)
def test_it_says_how_it_multiplies_and_from_how_many_rows_it_dequantises(
    device: Device, dtype: str, rank: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQ_LOADER_CACHE", str(tmp_path))
    spec = make_layer(Case(dtype="bfloat16", columns=100))[0]
    verdict = TritonKernel().consider(spec, device)
    assert isinstance(verdict, Accepted)
    assert (verdict.dtype, verdict.rank) == (dtype, rank)
    rows = default_crossover(device.arch or device.capability or (0, 0), 4)
    assert verdict.note == (f"weights stay packed; {how}; from {rows} rows on dequantised")
    assert verdict.scratch_bytes == 2 * spec.in_features * 128  # columns are padded


def test_it_says_the_rows_of_groups_of_unequal_sizes() -> None:
    spec = make_layer(Case(group_size=0))[0]
    verdict = TritonKernel().consider(spec, AMPERE)
    least, most = spec.group_rows
    assert verdict == Declined(
        "triton", f"groups of {least} to {most} rows; Triton takes multiples of 16"
    )


def test_the_interpreter_counts_as_a_gpu_and_ranks_last(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    verdict = TritonKernel().consider(make_layer(Case())[0], Device("cpu"))
    assert isinstance(verdict, Accepted)
    assert (verdict.rank, verdict.note) == (0, "interpreted, for tests")


@pytest.mark.parametrize(
    "case",
    [
        *(
            Case(bits=bits, group_size=group, act_order=order)
            for bits, group, order in product((2, 3, 4, 8), (-1, 32, 96), (False, True))
        ),
        Case(rows=576), Case(columns=100), Case(bias=True), Case(dtype="float32", group_size=96),
    ],
    ids=str,
)  # fmt: skip
def test_it_takes_the_memory_it_said(case: Case) -> None:
    spec, packed, _ = make_layer(case)
    verdict = TritonKernel().consider(spec, AMPERE)
    assert isinstance(verdict, Accepted)
    shape, *tensors = lay_out(spec, packed, "cpu")
    held = [*tensors, packed.bias]
    assert shape == Shape.of(spec)
    assert verdict.prepared_bytes == sum(it.numel() * 4 for it in held if it is not None)


INTERPRETED = """
import itertools, torch
import triton.language as tl
from columns import check_joined
from torch.library import opcheck
from gptq_loader_kernels.triton import TritonKernel, matmul
from gptq_loader_kernels.triton.operator import multiply_packed
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device
from gptq_loader_plugin.kernel import Accepted

kernel, cpu, checked = TritonKernel(), Device("cpu"), 0
groups = itertools.cycle((-1, 16, 32, 64, 96, 128, 64))
cases = [Case(bits=b, group_size=next(groups), act_order=a, sym=False, extreme_zeros=True, bias=s)
         for b, a, s in itertools.product((2, 3, 4, 8), (False, True), (False, True))]
cases += [Case(rows=576), Case(columns=100), Case(bits=3, layout="planar", dtype="bfloat16"),
          Case(bits=8, dtype="bfloat16"), Case(bits=2, group_size=96, dtype="float32")]
wanted = itertools.cycle(((1, torch.float16), (9, torch.bfloat16), (17, torch.float32),
                          (0, torch.float16), (8, torch.bfloat16), (40, torch.float16),
                          (1, torch.float32), (70, torch.bfloat16)))


def product(rows, dtype, spec):
    x = torch.randn(rows, spec.in_features, generator=torch.Generator().manual_seed(0))
    return x.to(dtype)


for case in cases:
    spec, packed, weight = make_layer(case)
    assert isinstance(kernel.consider(spec, cpu), Accepted), case
    module = kernel.prepare(spec, packed, cpu)
    for rows, dtype in itertools.islice(wanted, 3):
        x = product(rows, dtype, spec)
        y = module(x)
        assert y.dtype == dtype and y.shape == (rows, spec.out_features)
        expected = x.double() @ weight.T + (0 if packed.bias is None else packed.bias.double())
        error = float((y.double() - expected).norm() / expected.norm()) if rows else 0.0
        # y is rounded once, and float32's x to the 16 bits that the scales have
        limit = 4e-3 if torch.bfloat16 in (dtype, packed.scales.dtype) else 5e-4
        assert error < limit, (str(case), rows, dtype, error)
        checked += 1

# Other versions of Triton take the zeros otherwise.
matmul.REPEAT_ZEROS = tl.constexpr(not matmul.REPEAT_ZEROS.value)
for bits, group, scales in itertools.product((2, 3, 4, 8), (-1, 64), ("bfloat16", "float32")):
    spec, packed, weight = make_layer(Case(bits=bits, group_size=group, sym=False, dtype=scales))
    x = product(3, torch.bfloat16, spec)
    y, expected = kernel.prepare(spec, packed, cpu)(x).double(), x.double() @ weight.T
    assert float((y - expected).norm() / expected.norm()) < 4e-3, (bits, group, scales)

spec, packed, _ = make_layer(Case(bias=True))
module, x = kernel.prepare(spec, packed, cpu), product(3, torch.float16, spec)
assert torch.equal(module(x), module(x))  # the parts are added in one order
assert torch.equal(module(x)[1:2], module(x[1:2]))  # which M does not change
apart = torch.empty(3 * 256 + 1, dtype=torch.float16)[1:].view(3, 256).copy_(x)
assert apart.data_ptr() % 16 and torch.equal(module(apart), module(x))
module.crossover = 20  # rows, from which on it dequantises
for backend in ("eager", "aot_eager"):
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for rows in (3, 20):
            x = product(rows, torch.bfloat16, spec)
            assert torch.equal(compiled(x), module(x)), (backend, rows)
for rows in (3, 20):
    opcheck(multiply_packed, (product(rows, torch.bfloat16, spec), module.words, module.table,
            module.bias, module.bits, module.out_features, module.group_shift, module.scales,
            module.tiles, 8, True, 20, torch.float32),
            test_utils=("test_schema", "test_faketensor"))

# Joined layers: a tile of one reaches into the next, and behind the last.
for bits, act_order, scales in ((4, True, "float16"), (3, False, "float32")):
    spec, packed, _ = make_layer(
        Case(bits=bits, act_order=act_order, sym=False, columns=224, dtype=scales))
    for rows, crossover in ((1, 1 << 30), (9, 1 << 30), (3, 1)):
        check_joined(kernel, cpu, (spec, packed), (96, 64, 64), product(rows, torch.float16, spec),
                     crossover)
print(checked)
"""

# The same layers by the kernels without tensor cores, and dequantised.
ROWS_INTERPRETED = """
import itertools, torch
from columns import check_joined
from gptq_loader_kernels.triton import TritonKernel
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device
from gptq_loader_plugin.kernel import Accepted

kernel = TritonKernel()
turing, mi300 = Device("cpu", capability=(7, 5)), Device("cpu", arch="gfx942")
groups = itertools.cycle((-1, 16, 32, 64, 96, 128, 64))
cases = [Case(bits=b, group_size=next(groups), act_order=a, sym=False, extreme_zeros=True, bias=s)
         for b, a, s in itertools.product((2, 3, 4, 8), (False, True), (False, True))]
cases += [Case(bits=b, group_size=16) for b in (2, 3, 8)]
cases += [Case(rows=576), Case(columns=100), Case(bits=3, layout="planar", dtype="bfloat16"),
          Case(bits=8, dtype="bfloat16"), Case(bits=2, group_size=96, dtype="float32"),
          Case(bits=3, rows=288, group_size=96, columns=40)]
rows = itertools.cycle((1, 2, 3, 8, 17, 5))
dtypes = itertools.cycle((torch.float16, torch.float16, torch.bfloat16, torch.float32))
checked = 0
for case, device in zip(cases, itertools.cycle((turing, mi300))):
    spec, packed, weight = make_layer(case)
    assert isinstance(kernel.consider(spec, device), Accepted), case
    module = kernel.prepare(spec, packed, device)
    assert not module.tensor_cores and 8 < module.crossover < 128, module.crossover
    for crossover in (module.crossover, 1):
        module.crossover = crossover
        x = torch.randn(next(rows), spec.in_features, generator=torch.Generator().manual_seed(0))
        x = x.to(next(dtypes))
        y = module(x)
        assert y.dtype == x.dtype and y.shape == (len(x), spec.out_features)
        expected = x.double() @ weight.T + (0 if packed.bias is None else packed.bias.double())
        error = float((y.double() - expected).norm() / expected.norm())
        # y is rounded once, float32's x to the 16 bits that the scales have, and the dequantised
        # weight once; the interpreter rounds to bfloat16 towards zero
        coarse = torch.bfloat16 in (x.dtype, packed.scales.dtype)
        assert error < (6e-3 if coarse else 6e-4), (str(case), x.shape, x.dtype, crossover, error)
        checked += 1

spec, packed, weight = make_layer(Case(bias=True))
module = kernel.prepare(spec, packed, turing)
x = torch.randn(6, spec.in_features).half()
x[3] = torch.nan
for crossover in (1 << 30, 1):
    module.crossover = crossover
    y = module(x)
    assert torch.equal(y[:3], module(x)[:3]) and torch.isfinite(y[:3]).all(), crossover
    assert torch.isnan(y[3]).all() and torch.isfinite(y[4:]).all()
check_joined(kernel, turing, make_layer(Case(columns=224))[:2], (96, 64, 64), x[:2])
module.crossover, x = 4, x[:3].repeat(2, 1)
compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
with torch.inference_mode():
    for rows in (3, 4):
        assert torch.equal(compiled(x[:rows]), module(x[:rows])), rows
print(checked)
"""


def interpret(program: str, folder: Path) -> str:
    done = run_process(
        [sys.executable, "-W", "ignore", "-c", program],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "GPTQ_LOADER_CACHE": str(folder),
            "PYTHONPATH": str(Path(__file__).parent),
        },
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_its_products_are_right_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert interpret(INTERPRETED, tmp_path).strip() == "63"


def test_its_products_without_tensor_cores_are_right_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert interpret(ROWS_INTERPRETED, tmp_path).strip() == "50"


TUNED = """
from gptq_loader_kernels.triton.tuning import chosen_crossover, chosen_tiles, tune
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device

heard, cpu = [], Device("cpu", name="A GPU (80 GB)")


def narrow(call):  # a clock for which the narrowest tile is the fastest, and 384 rows a crossover
    module, x = call.func, call.args[0]
    if len(x) <= 16:
        assert call().shape == (len(x), module.out_features)
    if module.crossover == 1:
        return 384.0 if module.bits == 4 else 1e9
    return len(x) + 0.5 + sum(module.tiles[1::6]) / 1e6


layers = [make_layer(Case(bits=bits, columns=32))[0] for bits in (4, 3, 4)]
usual = chosen_crossover(layers[1], cpu)
print(tune(layers, cpu, heard.append, measure=narrow))
assert (heard[0].stage, heard[0].total, heard[-1].done) == ("tune", 12, 12)
assert [it.block_n for it in chosen_tiles(cpu, 3)] == [32, 32, 64, 64, 64]
assert [it.block_n for it in chosen_tiles(cpu, 8)] == [64, 64, 64, 64, 64]
assert chosen_crossover(layers[0], cpu) == 384
assert chosen_crossover(layers[1], cpu) == 1 << 30 != usual  # never
other = make_layer(Case(bits=4, columns=64))[0]  # of no shape that was measured
assert chosen_crossover(other, cpu) == chosen_crossover(other, Device("cpu", name="B")) < 1 << 30
"""


def test_tuning_keeps_the_fastest_tiles_and_the_crossovers_of_this_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    said = interpret(TUNED, tmp_path)
    file = tmp_path / "tuned" / "triton-a-gpu-80-gb.json"
    assert said.startswith("2 shapes measured; 6 of 10 choices differ from the defaults, the best")
    assert said.strip().endswith(f"; dequantised from 384 rows on; kept in {file}")
    kept = json.loads(file.read_text())
    assert (kept["version"], kept["gpu"]) == (2, "A GPU (80 GB)")
    assert {bits: list(it) for bits, it in kept["tiles"].items()} == {
        bits: [str(most) for most in BUCKETS] for bits in ("4", "3")
    }
    assert kept["crossovers"] == {"4": {"256x32": 384}, "3": {"256x32": NEVER}}


TUNED_ROWS = """
from gptq_loader_kernels.triton.tuning import chosen_crossover, chosen_tiles, tune
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device

turing = Device("cpu", name="T4", capability=(7, 5))


def timed(call):  # the tile of 8 rows is the fastest for many rows; 33 rows are a crossover
    module, x = call.func, call.args[0]
    assert not module.tensor_cores
    if len(x) == 4:
        assert call().shape == (4, module.out_features)
    if module.crossover == 1:
        return 33.0
    return len(x) + (0.5 if module.tiles[24] == 8 else 0.6)


layer = make_layer(Case(columns=32))[0]
print(tune([layer], turing, lambda progress: None, measure=timed))
assert [it.block_m for it in chosen_tiles(turing, 4)] == [1, 2, 4, 8, 8]
assert [it.block_m for it in chosen_tiles(Device("cpu", capability=(7, 5)), 4)] == [1, 2, 4, 8, 16]
assert chosen_crossover(layer, turing) == 48
"""


def test_tuning_without_tensor_cores_measures_fewer_rows(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    said = interpret(TUNED_ROWS, tmp_path)
    assert said.startswith("1 shape measured; 1 of 5 choices differ from the defaults")
    assert "; dequantised from 48 rows on; kept in " in said
    kept = json.loads((tmp_path / "tuned" / "triton-t4.json").read_text())
    assert (kept["capability"], list(kept["tiles"]["4"])) == (
        [7, 5],
        [str(it) for it in ROW_BUCKETS],
    )


OLDER = {
    "version": 1,
    "gpu": "NVIDIA GeForce RTX 3090",
    "capability": [8, 6],
    "tiles": {"4": {"8": asdict(candidates((8, 6), 4, 8)[1])}},
}


def test_a_file_of_before_crossovers_keeps_its_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GPTQ_LOADER_CACHE", str(tmp_path))
    device = Device("cuda", name="NVIDIA GeForce RTX 3090", capability=(8, 6))
    tuned_file(device).parent.mkdir()
    tuned_file(device).write_text(json.dumps(OLDER))
    assert chosen_tiles(device, 4)[0] == candidates((8, 6), 4, 8)[1] != default_tiles((8, 6), 4)[0]
    spec = make_layer(Case())[0]
    assert chosen_crossover(spec, device) == default_crossover((8, 6), 4)
    assert not caplog.messages
    newer = {**OLDER, "version": 2, "crossovers": {"4": {"256x96": 777}}}
    tuned_file(device).write_text(json.dumps(newer))
    os.utime(tuned_file(device), ns=(1, 1))
    assert chosen_crossover(spec, device) == 777
    verdict = TritonKernel().consider(spec, device)
    assert isinstance(verdict, Accepted)
    assert "from 777 rows on" in verdict.note


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": 0}',
        '{"version": 1, "capability": [9, 0], "tiles": {}}',
        '{"version": 1, "capability": [8, 6], "tiles": {"4": {"8": {"block_m": 7}}}}',
        '{"version": 3, "capability": [8, 6], "tiles": {}, "crossovers": {}}',
        '{"version": 2, "capability": [8, 6], "tiles": {}}',
        '{"version": 2, "capability": [8, 6], "tiles": {}, "crossovers": {"4": {"256x256": 0}}}',
        '{"version": 2, "capability": [8, 6], "tiles": {}, "crossovers": {"4": {"256x256": "9"}}}',
        '{"version": 1, "capability": [8, 6], "tiles": {"4": {"8": {"block_m": 512, "block_n": 512,'
        ' "block_k": 128, "warps": 4, "stages": 9}}}}',
    ],
)
def test_a_damaged_or_foreign_file_is_refused_in_words(
    content: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("GPTQ_LOADER_CACHE", str(tmp_path))
    device = Device("cuda", name="NVIDIA GeForce RTX 3090", capability=(8, 6))
    file = tuned_file(device)
    assert file == tmp_path / "tuned" / "triton-nvidia-geforce-rtx-3090.json"
    assert chosen_tiles(device, 4) == default_tiles((8, 6), 4)
    file.parent.mkdir()
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert chosen_tiles(device, 4) == chosen_tiles(device, 4) == default_tiles((8, 6), 4)
    assert len(caplog.messages) == 1
    assert f"{file} is not what tuning writes for this GPU" in caplog.text
    assert "run gptq-loader tune again, or delete the file" in caplog.text


def test_defaults_are_candidates_and_it_can_be_tuned() -> None:
    assert isinstance(TritonKernel(), Tunable)
    assert (buckets((8, 0)), buckets((7, 5)), buckets("gfx942")) == (
        BUCKETS,
        ROW_BUCKETS,
        ROW_BUCKETS,
    )
    for kind in ((7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), "gfx90a", "gfx1201"):
        for bits in (2, 3, 4, 8):
            for most, tile in zip(buckets(kind), default_tiles(kind, bits), strict=True):
                assert tile in candidates(kind, bits, most)
                assert tile.block_m <= most


PAGE = Path(__file__).parents[2] / "docs" / "kernels" / "triton.md"
BENCH = Path(__file__).parents[2] / "bench"


def crossovers() -> str:
    """Write the table of the page: the model's figures and what it works out."""
    lines = [
        "| GPU | stands for | TB/s | Tflop/s | issue, 1e12/s | 2 bits | 3 bits | 4 bits | 8 bits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, gpu in GPUS.items():
        name = kind if isinstance(kind, str) else f"sm{kind[0]}{kind[1]}"
        rows = [default_crossover(kind, bits) for bits in (2, 3, 4, 8)]
        cells = ["never" if it == NEVER else str(it) for it in rows]
        slots = [f"{INSTRUCTIONS[kind][bits]:.1f}" for bits in (2, 3, 4, 8)]
        lines.append(
            f"| {gpu.name} | {name} | {gpu.bandwidth / 1e12:.2f} | {gpu.matmul / 1e12:.0f} "
            f"| {gpu.issue / 1e12:.1f} "
            + "".join(f"| {cell} ({of}) " for cell, of in zip(cells, slots, strict=True))
            + "|"
        )
    return "\n".join(lines)


def test_the_page_has_the_models_crossovers() -> None:
    start, end = "<!-- crossovers: begin -->\n", "\n<!-- crossovers: end -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(start)
    written, _, after = rest.partition(end)
    if os.environ.get("GPTQ_LOADER_GOLDEN") == "write":
        PAGE.write_text(f"{before}{start}{crossovers()}{end}{after}", encoding="utf-8")
        return
    assert written == crossovers()


def test_a_crossover_is_where_the_two_estimates_meet() -> None:
    """By hand, for a T4 at 4 bits: a tile of 16 rows takes 36 slots a weight."""
    tile = 36.0 / (40 * 128 * 1.59e9)
    packed, dense = (0.5 + 4 / 128) / 0.32e12, 2 / 0.32e12
    assert INSTRUCTIONS[7, 5][4] == 36.0
    assert max(packed, 3 * tile) < packed + 2 * dense < 4 * tile
    assert default_crossover((7, 5), 4) == 49
    # a kind that the model does not know is the next older one; of AMD's, the nearest
    assert default_crossover((8, 7), 4) == default_crossover((8, 6), 4)
    assert default_crossover("gfx1201", 4) == default_crossover("gfx1100", 4)
    # faster arithmetic against memory makes decoding inside dearer
    assert default_crossover((10, 0), 4) < default_crossover((8, 9), 4) < NEVER


def compiled(program: str, folder: Path) -> str:
    """Compile a few configurations ahead of time, and return what was printed of them."""
    pytest.importorskip("triton")
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = run_process(
        [sys.executable, "-W", "ignore", BENCH / program, "--fast", "--jobs", "1"],
        env={**environ, "TRITON_CACHE_DIR": str(folder)},
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " configurations, 0 of them against a gate" in done.stdout
    return done.stdout


def test_it_compiles_to_tensor_cores_within_every_limit(tmp_path: Path) -> None:
    compiled("triton_aot.py", tmp_path)


def test_without_tensor_cores_it_compiles_within_every_limit(tmp_path: Path) -> None:
    shown = compiled("triton_aot_fma.py", tmp_path)
    for kind in ("sm70", "sm75", "gfx942", "gfx1100"):
        assert f"| {kind} | " in shown
