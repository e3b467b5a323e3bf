"""2-, 3-, 4- and 8-bit layers on NVIDIA GPUs from Ampere on, through a Triton kernel."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Declined

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

__all__ = ["TritonKernel", "gptq_kernels"]

RANK = 60  # below exllama (80) for one token at a time, above everything that dequantises
BITS = (2, 3, 4, 8)
OLDEST = (8, 0)
MULTIPLE = 32  # of in_features, so that 3-bit codes fill whole words
SMALLEST_GROUP = 16  # the least that tl.dot multiplies at a time


@dataclass(frozen=True, slots=True)
class TritonKernel:
    """Multiply by packed weights in float16 or bfloat16, with float32 sums."""

    name: str = "triton"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept what the kernel runs with tensor cores, where Triton is installed."""
        reason = _device_reason(device) or _layer_reason(layer) or _missing(device)
        if reason is not None:
            return Declined(self.name, reason)
        codes = layer.in_features * layer.out_features * layer.bits // 8
        tables = layer.groups * layer.out_features * 3 + 12 * layer.in_features
        return Accepted(
            self.name,
            RANK,
            dtype=layer.half_dtype,
            prepared_bytes=codes + tables,
            note="weights stay packed; decoded inside the matmul",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Sort the rows by group and move the words to the GPU as they are."""
        from gptq_loader_kernels.triton.linear import TritonLinear

        return TritonLinear(layer, packed, device.torch_name)


def _device_reason(device: Device) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA GPU; this is {device}"
    if device.capability is not None and device.capability < OLDEST:
        return (
            f"needs sm{OLDEST[0]}{OLDEST[1]} or newer: Triton has no tensor-core path on older "
            f"GPUs; this is {device}"
        )
    return None


def _layer_reason(layer: LayerSpec) -> str | None:
    if layer.bits not in BITS:
        return f"{layer.bits}-bit; Triton decodes 2, 3, 4 and 8 bits"
    if layer.in_features % MULTIPLE:
        return f"{layer.in_features} inputs; Triton takes multiples of {MULTIPLE}"
    if layer.group_unit % SMALLEST_GROUP:
        least, most = layer.group_rows
        rows = f"{most}" if least == most else f"{least} to {most}"
        return f"groups of {rows} rows; Triton takes multiples of {SMALLEST_GROUP}"
    return None


def _missing(device: Device) -> str | None:
    # Triton compiles by itself and comes with torch for CUDA: on a device that is not here it
    # counts as installed, built extensions or not.
    if not device.present or importlib.util.find_spec("triton") is not None:
        return None
    return "triton is not installed: pip install triton"


@hookimpl
def gptq_kernels() -> list[Kernel]:
    """Offer the Triton kernel."""
    return [TritonKernel()]
