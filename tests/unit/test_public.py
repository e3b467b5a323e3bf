"""What other people's code and scripts stand on: names, import paths, entry points, options."""

from __future__ import annotations

import inspect
import tomllib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from altered import golden

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
# Import paths that docs, examples and other programs name, beside gptq_loader_plugin itself.
STABLE = {
    "gptq_loader_plugin.kernel": (
        "Accepted",
        "Batcher",
        "Closable",
        "Declined",
        "Device",
        "Finisher",
        "Kernel",
        "LayerSpec",
        "Meter",
        "PackedLinear",
        "Tunable",
        "Verdict",
    ),
    "gptq_loader_plugin.checkpoint.reader": ("Checkpoint", "Reader", "open_checkpoint"),
    "gptq_loader_plugin.core_plugin": ("gptq_readers", "gptq_templates"),
    "gptq_loader_plugin.conformance": (),
    "gptq_loader_plugin.errors": ("GPTQLoaderError",),
    "gptq_loader_plugin.hookspecs": ("hookimpl", "hookspec"),
    "gptq_loader_plugin.host": ("Host",),
    "gptq_loader_plugin.hub": ("download",),
    "gptq_loader_plugin.plugins": ("GROUP", "Plugins"),
    "gptq_loader_plugin.reference": ("HubReference", "resolve"),
    "gptq_loader_extensions.gradio": ("registry",),
    "gptq_loader_kernels.cpu": ("CpuKernel", "gptq_kernels"),
    "gptq_loader_kernels.exllama": ("ExllamaKernel", "gptq_kernels"),
}


@pytest.mark.parametrize("module", STABLE)
def test_import_paths_stay(module: str) -> None:
    home = import_module(module)
    for name in STABLE[module]:
        assert getattr(home, name) is not None


def test_public_names_and_their_arguments_stay() -> None:
    import gptq_loader_plugin as gptq

    golden("public-names.txt", "".join(f"{line}\n" for line in _describe(gptq)))


def test_entry_points_stay() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"scripts": project["scripts"], **project["entry-points"]}
    lines = [
        f"{group}: {name} = {value}"
        for group, points in groups.items()
        for name, value in points.items()
    ]
    golden("entry-points.txt", "".join(f"{line}\n" for line in lines))


def test_commands_and_their_options_stay() -> None:
    from typer.main import get_command

    from gptq_loader_plugin.cli.app import app

    lines = _options(get_command(app), "gptq-loader")
    golden("command-options.txt", "".join(f"{line}\n" for line in lines))


def _describe(module: Any) -> Iterator[str]:
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value):
            yield name
            continue
        if inspect.isclass(value) and issubclass(value, Exception):
            bases = ", ".join(base.__name__ for base in value.__bases__)
            yield f"{name}({bases})"
            continue
        try:
            arguments = ", ".join(inspect.signature(value).parameters)
        except ValueError:
            arguments = ""
        yield f"{name}({arguments})"
        if not inspect.isclass(value):
            continue
        for member in sorted(vars(value)):
            if member[0] != "_" and not member.startswith("model_"):
                method = getattr(value, member)
                inner = (
                    f"({', '.join(inspect.signature(method).parameters)})"
                    if inspect.isfunction(method)
                    else ""
                )
                yield f"  {name}.{member}{inner}"


def _options(command: Any, path: str) -> Iterator[str]:
    for parameter in sorted(command.params, key=lambda it: (it.param_type_name, it.name or "")):
        words = "/".join([*parameter.opts, *parameter.secondary_opts])
        yield f"{path} {words}"
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _options(inner, f"{path} {name}")
