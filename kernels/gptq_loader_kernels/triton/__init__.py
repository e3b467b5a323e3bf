"""2-, 3-, 4- and 8-bit layers on NVIDIA GPUs from Ampere on, through Triton kernels."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_kernels.triton.shape import Shape
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Declined

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

__all__ = ["TritonKernel", "gptq_kernels"]

RANK = 60  # below exllama (80) for one token at a time, above everything that dequantises
INTERPRETED_RANK = 0  # below every kernel: the interpreter is a thousand times slower than any
BITS = (2, 3, 4, 8)
OLDEST = (8, 0)
MULTIPLE = 32  # of in_features, so that 3-bit codes fill whole words
SMALLEST_GROUP = 16  # rows a tensor core multiplies at a time


@dataclass(frozen=True, slots=True)
class TritonKernel:
    """Multiply by packed weights in float16 or bfloat16, with float32 sums."""

    name: str = "triton"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept what the kernel runs with tensor cores, where Triton is installed."""
        interpreted = _interpreted(device)
        reason = None if interpreted else _device_reason(device)
        reason = reason or _layer_reason(layer) or _missing(device)
        if reason is not None:
            return Declined(self.name, reason)
        return Accepted(
            self.name,
            INTERPRETED_RANK if interpreted else RANK,
            dtype=layer.half_dtype,
            prepared_bytes=Shape.of(layer).bytes(layer),
            note="interpreted, for tests"
            if interpreted
            else "weights stay packed; decoded inside the matmul",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Lay the codes out as tensor cores want them, with the tiles tuned for this GPU."""
        from gptq_loader_kernels.triton.linear import TritonLinear
        from gptq_loader_kernels.triton.tuning import chosen_tiles, multiprocessors

        return TritonLinear(
            layer,
            packed,
            device.torch_name,
            tiles=chosen_tiles(device, layer.bits),
            multiprocessors=multiprocessors(device),
        )

    def tune(
        self,
        layers: Sequence[LayerSpec],
        device: Device,
        progress: Callable[[Progress], None],
    ) -> str:
        """Measure every tile on layers of these shapes, and keep the fastest for this GPU."""
        from gptq_loader_kernels.triton.tuning import tune

        return tune(layers, device, progress)


def _interpreted(device: Device) -> bool:
    """Whether Triton's interpreter was asked for: it runs on the CPU, as an sm80 GPU would."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _device_reason(device: Device) -> str | None:
    if device.type == "rocm":
        return f"is tried on CUDA only, not yet on AMD GPUs; this is {device}"
    if device.type != "cuda":
        return f"needs a CUDA GPU; this is {device}"
    if device.capability is not None and device.capability < OLDEST:
        return (
            f"needs sm80 or newer: Triton has no tensor-core path on older GPUs; this is {device}"
        )
    return None


def _layer_reason(layer: LayerSpec) -> str | None:
    if layer.bits not in BITS:
        return f"{layer.bits}-bit; Triton decodes 2, 3, 4 and 8 bits"
    if layer.in_features % MULTIPLE:
        return f"{layer.in_features} inputs; Triton takes multiples of {MULTIPLE}"
    if layer.group_unit % SMALLEST_GROUP:
        smallest, largest = layer.group_rows
        rows = f"{largest}" if smallest == largest else f"{smallest} to {largest}"
        return f"groups of {rows} rows; Triton takes multiples of {SMALLEST_GROUP}"
    return None


def _missing(device: Device) -> str | None:
    # Triton compiles by itself and comes with torch for CUDA: on a device that is not here it
    # counts as installed, built extensions or not.
    if not device.present or importlib.util.find_spec("triton") is not None:
        return None
    return "Triton is not installed; pip install triton"


@hookimpl
def gptq_kernels() -> list[Kernel]:
    """Offer the Triton kernel."""
    return [TritonKernel()]
