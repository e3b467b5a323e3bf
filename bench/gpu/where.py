"""Where the parts run, how large they are, and which kernels serve there."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gptq_loader_plugin as gptq
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.verdict import Accepted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptq_loader_plugin import LoadedModel
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel, LayerSpec

__all__ = ["Where", "load_reference"]

ENGINE = "GPTQ_LOADER_ENGINE"

PLAIN = ("reference", "dense")  # that multiply by a dequantised weight, as torch does
NATIVE = "cpu"  # how kernels begin that are no GPU's: the CPU only stands in for one


@dataclass(frozen=True, slots=True)
class Where:
    """Where the parts run.

    Attributes:
        device: the GPU, or the CPU in its place.
        tiny: whether sizes are those of a test.
        folder: for checkpoints, caches and logs.
    """

    device: Device
    tiny: bool
    folder: Path

    @property
    def is_gpu(self) -> bool:
        """Whether there are graphs to capture and a clock of the device."""
        return self.device.type != "cpu"

    def load(self, path: Path, *, backend: str | None = None, check: bool = True) -> LoadedModel:
        """Load a model there, with the engine that a GPU has, and no kernel that is a CPU's own."""
        backend = backend if backend or self.is_gpu else PLAIN[-1]
        with _engine(None if self.is_gpu else "1"):
            name = self.device.torch_name
            return gptq.load(path, device=name, backend=backend, check=check)

    def fused_kernels(self, layer: LayerSpec) -> list[Kernel]:
        """List the kernels that keep a layer packed there, the highest rank first."""
        ranks = {}
        for kernel in Plugins(installed=True).kernels():
            verdict = kernel.consider(layer, self.device)
            if kernel.name in PLAIN or kernel.name.startswith(NATIVE):
                continue
            if isinstance(verdict, Accepted):
                ranks[kernel.name] = (verdict.rank, kernel)
        return [kernel for _, kernel in sorted(ranks.values(), key=lambda it: -it[0])]


def load_reference(path: Path) -> LoadedModel:
    """Load a model on the CPU in float32, each reply read by transformers alone."""
    with _engine("0"):
        return gptq.load(path, device="cpu", backend="reference", dtype="float32")


@contextmanager
def _engine(setting: str | None) -> Iterator[None]:
    """Have loads use the engine or not; None leaves it to the loader."""
    before = os.environ.get(ENGINE)
    if setting is not None:
        os.environ[ENGINE] = setting
    try:
        yield
    finally:
        if before is not None:
            os.environ[ENGINE] = before
        elif setting is not None:
            del os.environ[ENGINE]
