"""Build the native CPU library where there is a C++ compiler; all else is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "gptq_loader_kernels.cpu._gptq_cpu"
SOURCES = Path("kernels", "csrc")


class Library(build_ext):
    """Build a plain shared library: ctypes loads it, so no Python's name or symbol is in it."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file without a Python's tag."""
        return fullname.replace(".", "/") + ".so"


class Wheel(bdist_wheel):
    """One wheel of this platform serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Keep the platform of the tag alone."""
        return ("py3", "none", super().get_tag()[2])


# Without exceptions: none may pass through the C interface or out of a parallel region.
ARGUMENTS = ["-O3", "-g0", "-std=c++17", "-fno-exceptions", "-fno-rtti"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
# torch's own OpenMP runtime, where a wheel lies beside it: two in one process are two sets of
# threads that wait for each other, and not every machine has one outside torch.
TORCHS = ["-Wl,-rpath,$ORIGIN/../../torch/lib"] if sys.platform == "linux" else []

setup(
    # Without a compiler the build goes on: the kernel says so, and torch's operator is used.
    ext_modules=[]
    if sys.platform == "win32"
    else [
        Extension(
            NAME,
            sorted(str(it) for it in SOURCES.glob("*.cpp")),
            depends=sorted(str(it) for it in SOURCES.glob("*.h")),
            language="c++",
            extra_compile_args=[*ARGUMENTS, *OPENMP],
            extra_link_args=[*OPENMP, *TORCHS],
            optional=True,
        )
    ],
    cmdclass={"build_ext": Library, "bdist_wheel": Wheel},
)
