"""The oracle: dequantise to float32, then a plain matmul. Runs every layer, on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

__all__ = ["ReferenceKernel", "gptq_kernels"]

RANK = 1  # every other kernel is faster


@dataclass(frozen=True, slots=True)
class ReferenceKernel:
    """Multiply in float32 by the dequantised weight; every other kernel is compared with it."""

    name: str = "reference"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept any layer anywhere."""
        del device
        return Accepted(
            self.name,
            RANK,
            dtype="float32",
            prepared_bytes=4 * layer.in_features * layer.out_features,
            note="exact, and slow: for checking the others",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Dequantise to float32: four bytes a weight."""
        import torch

        del layer
        from gptq_loader_kernels.dense_linear import DenseLinear

        return DenseLinear(
            packed.dequantize().to(device.torch_name),
            None if packed.bias is None else packed.bias.to(device.torch_name, torch.float32),
        )


@hookimpl
def gptq_kernels() -> list[Kernel]:
    """Offer the reference kernel."""
    return [ReferenceKernel()]
