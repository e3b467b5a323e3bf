"""Where the parts run, how large they are, and which kernels serve there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.verdict import Accepted

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel, LayerSpec

__all__ = ["Where"]

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
