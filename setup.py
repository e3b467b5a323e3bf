"""Build the native CPU library where there is a C++ compiler; all else is in pyproject.toml.

GPTQ_LOADER_TARGET names another platform to build for, of TARGETS, which ziglang's clang compiles
for on any machine; or "any", for a wheel without the library.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NAME = "gptq_loader_kernels.cpu._gptq_cpu"
SOURCES = Path("kernels", "csrc")
# What zig compiles for by its own words, and the wheel's platform.
TARGETS = {
    "aarch64-linux": ("aarch64-linux-gnu.2.28", "manylinux_2_28_aarch64"),
    "x86_64-linux": ("x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64"),
    "x86_64-windows": ("x86_64-windows-gnu", "win_amd64"),
    "aarch64-macos": ("aarch64-macos.11.0", "macosx_11_0_arm64"),
    "x86_64-macos": ("x86_64-macos.11.0", "macosx_11_0_x86_64"),
}
# On Windows always: gcc does not hold vectors aligned there, and Microsoft's compiler has none.
TARGET = os.environ.get("GPTQ_LOADER_TARGET") or (
    "x86_64-windows" if sys.platform == "win32" else None
)


class Library(build_ext):
    """Build a plain shared library: ctypes loads it, so no Python's name or symbol is in it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the files side by side."""
        if TARGET:
            self.build_by_zig(ext)
            return
        compile_files = self.compiler.compile

        def compile_each(sources: list[str], **options: Any) -> list[str]:  # noqa: ANN401
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                objects = threads.map(lambda source: compile_files([source], **options), sources)
                return list(chain.from_iterable(objects))

        self.compiler.compile = compile_each
        super().build_extension(ext)

    def build_by_zig(self, ext: Extension) -> None:
        """Build for another platform: no runtime of a compiler's is needed there."""
        if importlib.util.find_spec("ziglang") is None:
            raise CompileError("ziglang is not installed")
        zig = [sys.executable, "-m", "ziglang", "c++", "-target", TARGETS[TARGET][0]]
        more = shlex.split(os.environ.get("CXXFLAGS", ""))
        folder = Path(self.build_temp, TARGET)
        folder.mkdir(parents=True, exist_ok=True)

        def run(*arguments: object) -> None:
            done = subprocess.run([*zig, *map(str, arguments)], check=False)  # noqa: S603 - ours
            if done.returncode:
                raise CompileError(f"zig could not build {ext.name}")

        def compile_one(source: str) -> Path:
            made = folder / (Path(source).stem + ".o")
            run(*ARGUMENTS, *more, "-fPIC", "-c", source, "-o", made)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compile_one, ext.sources))
        made = Path(self.get_ext_fullpath(ext.name))
        made.parent.mkdir(parents=True, exist_ok=True)
        run("-shared", "-s", "-O3", *objects, "-o", made)
        for beside in (".pdb", ".lib"):  # what Windows' linker adds
            made.with_suffix(beside).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file without a Python's tag."""
        windows = TARGET is not None and TARGET.endswith("windows")
        return fullname.replace(".", "/") + (".dll" if windows else ".so")


class Wheel(bdist_wheel):
    """One wheel of this platform serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Keep the platform of the tag alone."""
        if TARGET in TARGETS and os.environ.get("GPTQ_LOADER_TARGET"):
            return ("py3", "none", TARGETS[TARGET][1])
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
    if TARGET == "any"
    else [
        Extension(
            NAME,
            sorted(str(it) for it in SOURCES.glob("*.cpp")),
            depends=sorted(str(it) for it in SOURCES.glob("*.h")),
            language="c++",
            extra_compile_args=[*ARGUMENTS, *OPENMP],
            extra_link_args=[*OPENMP, *TORCHS],
            # For another platform it is asked for by name.
            optional=not os.environ.get("GPTQ_LOADER_TARGET"),
        )
    ],
    cmdclass={"build_ext": Library, "bdist_wheel": Wheel},
)
