"""The Triton kernel: truthful answers, right products, and real machine code, all without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gptq_loader_kernels.triton import TritonKernel
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device
from gptq_loader_plugin.kernel import Accepted, Declined

if TYPE_CHECKING:
    from pathlib import Path

AMPERE = Device("cuda", capability=(8, 6), present=False)
RDNA = Device("rocm", arch="gfx1100", present=False)
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
    (Case(), Device("cuda", capability=(7, 5), present=False), "no tensor-core path on older"),
    (Case(), RDNA, "needs a CUDA GPU; this is rocm gfx1100"),
    (Case(), Device("cpu"), "needs a CUDA GPU; this is cpu"),
    (Case(bits=5, layout="planar"), AMPERE, "5-bit; Triton decodes"),
    (Case(group_size=0), AMPERE, "Triton takes multiples of 16"),
    (Case(rows=40, group_size=-1), AMPERE, "40 inputs; Triton takes multiples of 32"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "device", "words"), CASES, ids=lambda it: str(it)[:48])
def test_it_answers_truthfully(case: Case, device: Device, words: str | None) -> None:
    verdict = TritonKernel().consider(make_layer(case)[0], device)
    if words is None:
        assert isinstance(verdict, Accepted)
    else:
        assert isinstance(verdict, Declined)
        assert words in verdict.reason


INTERPRETED = """
import itertools, torch
from gptq_loader_kernels.triton import TritonKernel
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device
from gptq_loader_plugin.kernel import Accepted

ampere, cpu, checked = Device("cuda", capability=(8, 6), present=False), Device("cpu"), 0
cases = [Case(bits=b, group_size=g, act_order=a, sym=False, extreme_zeros=True)
         for b, g, a in itertools.product((2, 3, 4, 8), (-1, 16, 32, 64, 96, 128), (False, True))]
cases += [Case(rows=576), Case(columns=100), Case(bias=True), Case(bits=3, layout="planar"),
          Case(dtype="float32")]  # the interpreter's numpy has no bfloat16: that one is compiled
for case in cases:
    spec, packed, weight = make_layer(case)
    assert isinstance(TritonKernel().consider(spec, ampere), Accepted), case
    module = TritonKernel().prepare(spec, packed, cpu)
    for rows in (1, 17):
        x = torch.randn(rows, spec.in_features, generator=torch.Generator().manual_seed(0))
        expected = x.double() @ weight.T + (0 if packed.bias is None else packed.bias.double())
        error = float((module(x) - expected).norm() / expected.norm())
        assert error < 5e-4, (str(case), rows, error)
        checked += 1
print(checked)
"""


def test_its_products_are_right_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "106"


# Shared memory a block may have, by compute capability (CUDA C++ Programming Guide, table 24).
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
COMPILED = """
import subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gptq_loader_kernels.triton.matmul import matmul

dtype = sys.argv.pop()
capability, bits, block_m, block_k = (int(it) for it in sys.argv[1:])
names = matmul.arg_names
kinds = ("*" + dtype, "*i32", "*u8", "*" + dtype, "*i32", "*fp32", "i32", "i32", "i32")
types = dict(zip(names, kinds))
values = dict(BITS=bits, BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=block_k, SPLIT_K=4)
signature = {name: types.get(name, "constexpr") for name in names}
constants = {(names.index(name),): value for name, value in values.items()}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(9) if i != 6}
source = ASTSource(matmul, signature, constants, aligned)
made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
print("shared", made.metadata.shared)
ptx = made.asm["ptx"]
print("tensor cores", "mma" in ptx)
tool = "ptxas-blackwell" if capability >= 90 else "ptxas"
from pathlib import Path
binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
    file.write(ptx); file.flush()
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    said = subprocess.run([binary, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"],
                          capture_output=True, text=True)
print(said.stderr)
"""


@pytest.mark.parametrize("capability", sorted(SHARED))
@pytest.mark.parametrize(
    ("bits", "block_m", "block_k", "dtype"),
    [(4, 16, 64, "fp16"), (4, 64, 64, "bf16"), (3, 64, 32, "fp16")],
)
def test_it_compiles_to_tensor_cores_without_spills(
    capability: int, bits: int, block_m: int, block_k: int, dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-",
            *map(str, (capability, bits, block_m, block_k, dtype)),
        ],
        input=COMPILED,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tensor cores True" in done.stdout
    shared = re.search(r"shared (\d+)", done.stdout)
    assert shared is not None
    assert int(shared[1]) <= SHARED[capability]
    spills = re.findall(r"(\d+) bytes spill", done.stdout)
    assert spills, done.stdout
    assert set(spills) == {"0"}, done.stdout
