"""The repository's shape is load-bearing; these say why."""

from __future__ import annotations

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from processes import run_process

ROOT = Path(__file__).parents[2]
PLUGINS = sorted({it.value for it in entry_points(group="gptq_loader_plugin")})
HEAVY = ("torch", "transformers", "pydantic", "gradio", "triton", "exllamav2", "numpy")


@pytest.mark.parametrize("folder", ["kernels", "extensions", "tests", "examples"])
def test_source_roots_are_not_packages(folder: str) -> None:
    """`kernels` is Hugging Face's import name and `extensions` is text-generation-webui's."""
    assert not (ROOT / folder / "__init__.py").exists()


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted(set(sys.modules)))"
    completed = run_process([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
    return {name.partition(".")[0] for name in completed.stdout.split()}


def test_importing_the_package_is_free() -> None:
    assert not imported_by("import gptq_loader_plugin") & set(HEAVY)


@pytest.mark.parametrize("module", PLUGINS)
def test_importing_a_plugin_is_nearly_free(module: str) -> None:
    """A plugin may use numpy and no more: `explain` imports every one of them."""
    assert not imported_by(f"import {module}") & (set(HEAVY) - {"numpy"})


def test_every_public_name_resolves() -> None:
    import gptq_loader_plugin as gptq

    assert gptq.__all__ == sorted(gptq.__all__)
    for name in gptq.__all__:
        assert getattr(gptq, name) is not None
    assert set(dir(gptq)) == set(gptq.__all__)
    with pytest.raises(AttributeError, match="lod"):
        _ = gptq.lod  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "file",
    [*(ROOT / "gptq_loader_plugin").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")],
    ids=lambda it: it.name,
)
def test_a_module_is_one_idea(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert re.match(r'r?"""\S', text), "its first line says what it is for"
