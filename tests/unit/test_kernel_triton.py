"""The Triton kernel: truthful answers, right products, and real machine code, all without a GPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from gptq_loader_kernels.triton import TritonKernel
from gptq_loader_kernels.triton.layout import lay_out
from gptq_loader_kernels.triton.shape import Shape
from gptq_loader_kernels.triton.tiles import BUCKETS, candidates, default_tiles
from gptq_loader_kernels.triton.tuning import chosen_tiles, tuned_file
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device
from gptq_loader_plugin.kernel import Accepted, Declined, Tunable

AMPERE = Device("cuda", capability=(8, 6), present=False)
RDNA = Device("rocm", arch="gfx1100", present=False)
TURING = "needs sm80 or newer: Triton has no tensor-core path on older GPUs; this is cuda sm75"
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
    (Case(), Device("cuda", capability=(7, 5), present=False), TURING),
    (Case(), RDNA, "is tried on CUDA only, not yet on AMD GPUs; this is rocm gfx1100"),
    (Case(), Device("cpu"), "needs a CUDA GPU; this is cpu"),
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
for backend in ("eager", "aot_eager"):
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for rows in (3, 20):
            x = product(rows, torch.bfloat16, spec)
            assert torch.equal(compiled(x), module(x)), (backend, rows)
opcheck(multiply_packed, (x, module.words, module.table, module.bias, module.bits,
        module.out_features, module.group_shift, module.scales, module.tiles, 8, torch.float32),
        test_utils=("test_schema", "test_faketensor"))
print(checked)
"""


def interpret(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={
            **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
            "GPTQ_LOADER_CACHE": str(folder),
        },
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_its_products_are_right_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert interpret(INTERPRETED, tmp_path).strip() == "63"


TUNED = """
from gptq_loader_kernels.triton.tuning import chosen_tiles, tune
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device

heard, cpu = [], Device("cpu", name="A GPU (80 GB)")


def narrow(call):  # a clock for which the narrowest tile is the fastest
    module, x = call.func, call.args[0]
    if len(x) <= 16:
        assert call().shape == (len(x), module.out_features)
    return float(sum(module.tiles[1::6]))


layers = [make_layer(Case(bits=bits, columns=32))[0] for bits in (4, 3, 4)]
print(tune(layers, cpu, heard.append, measure=narrow))
assert (heard[0].stage, heard[0].total, heard[-1].done) == ("tune", 10, 10)
assert [it.block_n for it in chosen_tiles(cpu, 3)] == [32, 32, 64, 64, 64]
assert [it.block_n for it in chosen_tiles(cpu, 8)] == [64, 64, 64, 64, 64]
"""


def test_tuning_keeps_the_fastest_tiles_for_this_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    said = interpret(TUNED, tmp_path)
    file = tmp_path / "tuned" / "triton-a-gpu-80-gb.json"
    assert said.startswith("2 shapes measured; 6 of 10 choices differ from the defaults, the best")
    assert said.strip().endswith(f"kept in {file}")
    kept = json.loads(file.read_text())
    assert kept["gpu"] == "A GPU (80 GB)"
    assert {bits: list(it) for bits, it in kept["tiles"].items()} == {
        bits: [str(most) for most in BUCKETS] for bits in ("4", "3")
    }


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": 0}',
        '{"version": 1, "capability": [9, 0], "tiles": {}}',
        '{"version": 1, "capability": [8, 6], "tiles": {"4": {"8": {"block_m": 7}}}}',
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
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        for bits in (2, 3, 4, 8):
            for most, tile in zip(BUCKETS, default_tiles(capability, bits), strict=True):
                assert tile in candidates(capability, bits, most)
                assert tile.block_m <= most


def test_it_compiles_to_tensor_cores_within_every_limit(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    program = Path(__file__).parents[2] / "bench" / "triton_aot.py"
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, "--fast", "--jobs", "1"],
        env={**environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "4 configurations, 0 of them against a gate" in done.stdout
