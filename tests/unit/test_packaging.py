"""The wheel and the sdist hold everything, and work from another folder."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import run_process

ROOT = Path(__file__).parents[2]
MODULES = (
    "gptq_loader_plugin.checkpoint.reader",
    "gptq_loader_plugin.cli",
    "gptq_loader_plugin.conformance.layers",
    "gptq_loader_plugin.quantize",
    "gptq_loader_kernels.cpu",
    "gptq_loader_kernels.exllama",
    "gptq_loader_kernels.triton",
    "gptq_loader_extensions.gradio",
    "gptq_loader_extensions.webui",
    "gptq_loader_extensions.llm",
    "gptq_loader_extensions.lm_eval",
    "gptq_loader_extensions.transformers",
    "gptq_loader_extensions.vllm",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    completed = run_process(command)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return out


def test_the_wheel_is_complete_and_works_elsewhere(built: Path, tmp_path: Path) -> None:
    wheel = next(built.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    for module in MODULES:
        path = module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & names, module
    assert "gptq_loader_plugin/py.typed" in names
    for inner in ("llm/models", "llm/commands", "lm_eval/model", "lm_eval/__main__"):
        assert f"gptq_loader_extensions/{inner}.py" in names
    points = zipfile.ZipFile(wheel).read(
        next(it for it in names if it.endswith("entry_points.txt"))
    )
    assert b"[llm]\ngptq-loader = gptq_loader_extensions.llm\n" in points
    assert not any(name.startswith(("kernels/", "extensions/", "tests/")) for name in names)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "\n".join(
        [
            "import importlib",
            *(f"importlib.import_module({module!r})" for module in MODULES),
            "import gptq_loader_plugin",
            "print(gptq_loader_plugin.__file__)",
        ]
    )
    environ = {"PYTHONPATH": str(site), "PATH": ""}
    completed = run_process([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=True)
    assert completed.stdout.startswith(str(site))


def test_the_sdist_has_the_source_roots(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert "kernels/gptq_loader_kernels/cpu/__init__.py" in names
    assert "extensions/gptq_loader_extensions/__init__.py" in names
    assert "LICENSE" in names


def test_a_wheel_without_the_library_is_for_any_platform(tmp_path: Path) -> None:
    pytest.importorskip("build")
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "tests")
    )
    environment = {**os.environ, "GPTQ_LOADER_TARGET": "any"}
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    run_process([*command, source], env=environment, check=True)
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "gptq_loader_kernels/cpu/library.py" in names
    assert not any(name.endswith((".so", ".dll")) for name in names)
