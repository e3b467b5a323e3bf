"""The fallback on any device: dequantise once, then the vendor's matmul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_kernels.dtypes import matmul_dtype
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

__all__ = ["DenseKernel", "gptq_kernels"]

RANK = 10  # above reference (float32), below every kernel that reads packed weights
# Above torch (20), which unpacks what this reads: one read of 16 bits a weight in place of some ten
# bytes. Below every kernel that unpacks inside its product.
RANK_IF_FITS = 30


@dataclass(frozen=True, slots=True)
class DenseKernel:
    """Multiply by the dequantised weight in the device's own 16-bit dtype."""

    name: str = "dense"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept any layer anywhere, and say what it costs in memory."""
        dtype = matmul_dtype(device, layer)
        size = 4 if dtype == "float32" else 2
        dense = size * layer.in_features * layer.out_features
        times = round(dense / layer.packed_bytes)
        return Accepted(
            self.name,
            RANK,
            dtype=dtype,
            prepared_bytes=dense,
            rank_if_fits=RANK_IF_FITS,
            note=f"weights dequantised once to {dtype}, about {times} times the packed bytes",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Dequantise in float32 and round once to the compute dtype."""
        import torch

        from gptq_loader_kernels.dense_linear import DenseLinear

        dtype = getattr(torch, matmul_dtype(device, layer))
        bias = None if packed.bias is None else packed.bias.to(device.torch_name, dtype)
        return DenseLinear(packed.dequantize(dtype).to(device.torch_name), bias)


@hookimpl
def gptq_kernels() -> list[Kernel]:
    """Offer the dense kernel."""
    return [DenseKernel()]
