"""The conformance suite on our kernels that run here, and the table of what each declines."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from altered import golden
from processes import run_process

from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin import Plugins
from gptq_loader_plugin.conformance.check import consider
from gptq_loader_plugin.conformance.cover import pairwise_cover
from gptq_loader_plugin.conformance.declined import DeclinedTable
from gptq_loader_plugin.conformance.grid import cells_of, possible_layers
from gptq_loader_plugin.conformance.layers import make_spec
from gptq_loader_plugin.conformance.run import by_layer, run
from gptq_loader_plugin.device import Device, find_device
from gptq_loader_plugin.kernel import Declined

if TYPE_CHECKING:
    import subprocess

ROOT = Path(__file__).parents[2]
SUITE = ("-m", "pytest", "--pyargs", "gptq_loader_plugin.conformance", "-q", "-W", "error")
CPU = Device("cpu", features=frozenset({"avx2", "avx512f", "avx512_bf16"}))
GPU = Device("cuda", capability=(8, 6), present=False, assume_built=True)
native = pytest.mark.skipif(find_library() is None, reason="no C++ compiler built the library")
HERE = ["reference", "dense", "torch", "cpu-int4", pytest.param("cpu", marks=native)]


def suite(folder: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the suite as a kernel's author would, from a folder of nothing."""
    return run_process(
        [sys.executable, *SUITE, "-p", "no:cacheprovider", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        cwd=folder,
        seconds=1100,
    )


@pytest.mark.parametrize("kernel", HERE)
def test_it_conforms(kernel: str, tmp_path: Path) -> None:
    completed = suite(tmp_path, "--kernel", kernel, "--device", "cpu")
    assert completed.returncode == 0, completed.stdout
    assert re.search(r"\d+ passed", completed.stdout), completed.stdout


@pytest.mark.timeout(1200)  # seconds: the interpreter is slow
def test_triton_conforms_in_its_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    completed = suite(tmp_path, "--kernel", "triton", "--device", "cpu", TRITON_INTERPRET="1")
    assert completed.returncode == 0, completed.stdout
    passed = re.search(r"(\d+) passed", completed.stdout)
    assert passed is not None, completed.stdout
    assert int(passed[1]) > 100, completed.stdout


EXLLAMA = ("--kernel", "exllama", "--device", "cpu")
WITHOUT_GPU = "needs a CUDA or ROCm GPU; this is cpu"


def test_exllama_is_skipped_without_a_gpu_where_that_is_allowed(tmp_path: Path) -> None:
    completed = suite(tmp_path, *EXLLAMA, "--allow-none", "-rs", COLUMNS="200")
    assert completed.returncode == 0, completed.stdout
    assert f"exllama: {WITHOUT_GPU}" in completed.stdout
    assert "skipped" in completed.stdout


def test_exllama_fails_without_a_gpu(tmp_path: Path) -> None:
    completed = suite(tmp_path, *EXLLAMA)
    assert completed.returncode == 1
    assert re.search(r"^1 failed, \d+ passed, \d+ skipped", completed.stdout, re.MULTILINE)
    assert "exllama accepts none of 336 cells here" in completed.stdout
    assert WITHOUT_GPU in completed.stdout
    assert "use --allow-none" in completed.stdout


NEVER = """
from gptq_loader_plugin import Declined, hookimpl

class Never:
    name = "never"

    def consider(self, layer, device):
        return Declined(self.name, f"{layer.bits}-bit; this takes none")

    def prepare(self, layer, packed, device):
        raise RuntimeError

@hookimpl
def gptq_kernels():
    return [Never()]
"""


@pytest.fixture
def never(tmp_path: Path) -> Path:
    """A folder with an installed plugin, whose kernel declines every layer."""
    information = tmp_path / "never-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: never\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[gptq_loader_plugin]\nnever = never\n")
    (tmp_path / "never.py").write_text(NEVER)
    return tmp_path


def test_a_kernel_that_declines_everything_fails(never: Path) -> None:
    environ = {"PYTHONPATH": str(never)}
    completed = suite(never, "--kernel", "never", "--device", "cpu", **environ)
    assert completed.returncode == 1
    assert "never accepts none of 336 cells here, so nothing of it was tested" in completed.stdout
    assert re.search(r"^ +\d+  …-bit; this takes none$", completed.stdout, re.MULTILINE)
    allowed = suite(never, "--kernel", "never", "--device", "cpu", "--allow-none", **environ)
    assert allowed.returncode == 0, allowed.stdout


def test_the_command_fails_where_a_kernel_declines_everything(never: Path) -> None:
    command = [sys.executable, "-m", "gptq_loader_plugin.conformance", "--device", "cpu"]
    command += ["--cells", "cover", "--part", "1/20", "--kernel", "reference", "--kernel", "never"]
    environ = {**os.environ, "PYTHONPATH": str(never)}
    completed = run_process(command, env=environ, cwd=never)
    assert completed.returncode == 1
    assert "error: never accepts none of 17 cells here" in completed.stderr
    assert "…-bit; this takes none" in completed.stderr
    assert "error: reference" not in completed.stderr
    assert run_process([*command, "--allow-none"], env=environ, cwd=never).returncode == 0


@pytest.mark.parametrize(
    ("kernel", "device"),
    [
        *((it, CPU) for it in ("reference", "dense", "torch", "cpu-int4")),
        pytest.param("cpu", CPU, marks=native),
        *((it, GPU) for it in ("triton", "exllama")),
    ],
    ids=str,
)
def test_it_declines_only_what_it_says(kernel: str, device: Device) -> None:
    """Over the whole grid; a kernel cannot start declining, or say why in other words, unseen."""
    asked = next(it for it in Plugins(installed=True).kernels() if it.name == kernel)
    table, cells = DeclinedTable(), 0
    for layer in possible_layers():
        here = sum(1 for _ in cells_of(layer))
        cells += here
        verdict = consider(asked, make_spec(layer.case), device)
        if isinstance(verdict, Declined):
            table.add(layer, verdict.reason, here)
    words = f"on {device}, {cells - table.cells:,} of {cells:,} cells are accepted\n"
    golden(f"conformance-{kernel}.txt", words + table.text())


def test_the_kernel_of_the_hooks_page_conforms() -> None:
    page = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    code = next(it for it in blocks if "gptq_kernels" in it)
    documented: dict[str, object] = {}
    exec(code, documented)
    offer = documented["gptq_kernels"]
    assert callable(offer)
    work = by_layer(pairwise_cover(possible_layers()), ())
    (report,) = run(offer(), find_device("cpu"), work)
    assert not report.failed, report.text()
    assert report.passed
