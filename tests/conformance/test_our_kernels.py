"""The conformance suite on our kernels that run here, and the table of what each declines."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
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
GOLDEN = Path(__file__).parents[1] / "golden"
SUITE = ("-m", "pytest", "--pyargs", "gptq_loader_plugin.conformance", "-q", "-W", "error")
CPU = Device("cpu", features=frozenset({"avx2", "avx512f", "avx512_bf16"}))
GPU = Device("cuda", capability=(8, 6), present=False, assume_built=True)
native = pytest.mark.skipif(find_library() is None, reason="no C++ compiler built the library")
HERE = ["reference", "dense", "cpu-int4", pytest.param("cpu", marks=native)]


def suite(folder: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the suite as a kernel's author would, from a folder of nothing."""
    return run_process(
        [sys.executable, *SUITE, "-p", "no:cacheprovider", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        cwd=folder,
    )


@pytest.mark.parametrize("kernel", HERE)
def test_it_conforms(kernel: str, tmp_path: Path) -> None:
    done = suite(tmp_path, "--kernel", kernel, "--device", "cpu")
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout), done.stdout


def test_triton_conforms_in_its_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = suite(tmp_path, "--kernel", "triton", "--device", "cpu", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 100, done.stdout


def test_exllama_is_skipped_where_there_is_no_gpu(tmp_path: Path) -> None:
    done = suite(tmp_path, "--kernel", "exllama", "--device", "cpu", "-rs", COLUMNS="200")
    assert done.returncode == 0, done.stdout
    assert "exllama: needs a CUDA or ROCm GPU; this is cpu" in done.stdout


@pytest.mark.parametrize(
    ("kernel", "device"),
    [
        *((it, CPU) for it in ("reference", "dense", "cpu-int4")),
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
    file = GOLDEN / f"conformance-{kernel}.txt"
    if os.environ.get("GPTQ_LOADER_GOLDEN") == "write":
        file.write_text(words + table.text(), encoding="utf-8")
    assert words + table.text() == file.read_text(encoding="utf-8")


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
