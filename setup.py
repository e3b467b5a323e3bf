"""Build the native CPU library where there is a C++ compiler; all else is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "gptq_loader_kernels.cpu._gptq_cpu"
SOURCES = Path("kernels", "csrc")


class Library(build_ext):
    """Build a plain shared library: ctypes loads it, so no Python's name or symbol is in it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the files side by side."""
        compile_files = self.compiler.compile

        def compile_each(sources: list[str], **options: Any) -> list[str]:  # noqa: ANN401
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                objects = threads.map(lambda source: compile_files([source], **options), sources)
                return list(chain.from_iterable(objects))

        self.compiler.compile = compile_each
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file without a Python's tag."""
        return fullname.replace(".", "/") + ".so"


class Wheel(bdist_wheel):
    """One wheel of this platform serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Keep the platform of the tag alone."""
        return ("py3", "none", super().get_tag()[2])


# Nothing throws (tools/check_native.py), yet -fno-exceptions is left out: gcc 12's code for
# one row of bfloat16 then takes 3 to 4 % longer at 2 and 4 bits (576x1536, an EPYC, one thread).
ARGUMENTS = ["-O3", "-g0", "-std=c++17"]
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
