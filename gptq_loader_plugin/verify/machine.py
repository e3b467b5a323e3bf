"""Look at the machine for what is known to go wrong, each with its remedy."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.system.folders import cache_folder
from gptq_loader_plugin.system.memory import total_memory
from gptq_loader_plugin.system.units import write_size
from gptq_loader_plugin.verify.packages import diagnose_packages
from gptq_loader_plugin.verify.report import Diagnosis

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["diagnose_machine"]

STRAY = re.compile(r"=\d[\d.]*")  # what a shell makes of pip install transformers>=4.32.0
BUSY = 1.5  # runnable tasks a core; two OpenMP threads on a busy core were 27 times slower
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
OLD_QUOTA = Path("/sys/fs/cgroup/cpu")  # of control groups of the first version
COMPILERS = ("c++", "g++", "clang++", "cl")
DISK_FREE = 2 * 10**9  # bytes; the smallest useful checkpoints take as much
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
        *diagnose_packages(),
        *_limits(cpu_max),
        *_disk(environ),
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
    if built is None:
        return
    if driver is not None:
        yield from _driver(driver, built)
    if torch.cuda.is_available():
        yield from _architectures()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return
    match = re.search(r"release (\d+)\.", _output([nvcc, "--version"]))
    if match and match[1] != built.partition(".")[0]:
        yield Diagnosis(
            "the CUDA compiler is of another release than torch's: extensions that are compiled "
            "here will not load",
            f"nvcc {match[1]}, torch for CUDA {built}",
            f"put CUDA {built}'s nvcc first in PATH, or install a torch for CUDA {match[1]}",
        )


def _driver(nvidia_smi: str, built: str) -> Iterator[Diagnosis]:
    """Compare the CUDA that the driver takes with the one that torch is built for."""
    match = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", _output([nvidia_smi]))
    if match is None:
        yield Diagnosis(
            "the NVIDIA driver does not answer: it was updated without a restart, or its module "
            "is not loaded",
            f"{nvidia_smi} names no CUDA version",
            "restart the machine; in a container, update the driver outside it",
        )
    elif int(match[1]) < int(built.partition(".")[0]):
        yield Diagnosis(
            "the driver is older than torch's CUDA",
            f"the driver takes CUDA {match[1]}.{match[2]}, torch is for {built}",
            f"update the driver, or install a torch for CUDA {match[1]}: pytorch.org names it",
        )


def _architectures() -> Iterator[Diagnosis]:
    """Find GPUs that torch has no code for: newer than it, or no longer supported."""
    import torch

    built = sorted(
        int(name[3:].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")
    )
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if built and not any(it // 10 == major and it <= 10 * major + minor for it in built):
            yield Diagnosis(
                f"torch has no code for {torch.cuda.get_device_name(index)}",
                f"it is sm_{major}{minor}; torch {torch.__version__} has sm_{built[0]} to "
                f"sm_{built[-1]}",
                "install a newer torch for a newer GPU, or an older one for an older GPU",
            )


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(  # noqa: S603 - what PATH names
            command, capture_output=True, text=True, timeout=SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _kernels() -> Iterator[Diagnosis]:
    from gptq_loader_plugin.plugins.discovery import discover

    for plugin in discover():
        if plugin.state == "broken":
            yield Diagnosis(
                f"the plugin {plugin.name} fails", plugin.error, "update it, or uninstall it"
            )
        for offer in plugin.offers:
            if offer.kind == "kernel" and offer.works is False and "compiler" in offer.detail:
                compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
                yield Diagnosis(
                    f"the kernel {offer.name} is not built, and slower ones run instead",
                    f"{offer.detail}; {compiler or 'no C++ compiler'} here, a {_processor()}",
                    "install this package again: pip install --force-reinstall --no-deps "
                    "gptq-loader-plugin"
                    if compiler
                    else "install a C++ compiler (apt install g++), and this package again",
                )


def _processor() -> str:
    return platform.processor() or platform.machine()


def _limits(cpu_max: Path) -> Iterator[Diagnosis]:
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    allowed = min(float(cores), _quota(cpu_max))
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


def _quota(cpu_max: Path) -> float:
    """Return how many processors a control group may use; infinity where it has no limit."""
    try:
        if cpu_max.is_file():
            quota, period = cpu_max.read_text().split()
        else:
            quota = (OLD_QUOTA / "cpu.cfs_quota_us").read_text()
            period = (OLD_QUOTA / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no limit, or none that can be read
        return math.inf


def _disk(environ: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Look at the disk that downloads and the demo go to."""
    folder = cache_folder(environ)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < DISK_FREE:
        yield Diagnosis(
            "the disk is nearly full: downloads and the demo end in the middle",
            f"{write_size(free)} is free in {folder}",
            "delete what is not needed (huggingface-cli delete-cache), or set GPTQ_LOADER_CACHE "
            "to a folder on another disk",
        )


def _variables(environ: Mapping[str, str]) -> Iterator[Diagnosis]:
    for name, words in (
        ("HF_ENDPOINT", "repositories come from another hub than huggingface.co"),
        ("HF_HUB_OFFLINE", "nothing is downloaded"),
        ("GPTQ_LOADER_NATIVE", "the native library may be taken for missing"),
        ("GPTQ_LOADER_ISA", "the native library leaves out some of the processor's instructions"),
        ("GPTQ_LOADER_PLUGINS", "some plugins are left out"),
        ("CUDA_VISIBLE_DEVICES", "some GPUs may be hidden"),
    ):
        if value := environ.get(name):
            yield Diagnosis(words, f"{name}={value}", f"unset {name}, if that is not meant")
