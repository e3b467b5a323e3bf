"""2-, 3-, 4- and 8-bit layers on GPUs of NVIDIA and AMD, through Triton kernels."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_kernels.dtypes import matmul_dtype
from gptq_loader_kernels.triton.crossover import NEVER
from gptq_loader_kernels.triton.shape import Shape
from gptq_loader_kernels.triton.tiles import expert_tiles, has_tensor_cores, kind_of
from gptq_loader_kernels.triton.tuning import chosen_crossover
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
# Volta and Turing have bfloat16 neither in tensor cores nor in torch's fast matmuls: there it
# computes in float16 as exllama does, and below its cast (55).
FLOAT16_RANK = 50
BITS = (2, 3, 4, 8)
OLDEST = (7, 0)  # that Triton's compiler makes code for which passes the gates
# AMD's, for which `make aot` compiles it; Triton makes no code for those before (gfx1030).
ARCHES = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201")
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
        crossover = chosen_crossover(layer, device)
        return Accepted(
            self.name,
            INTERPRETED_RANK if interpreted else _rank(device),
            dtype=_dtype(layer, device),
            prepared_bytes=Shape.of(layer).bytes(layer),
            note="interpreted, for tests" if interpreted else _note(device, crossover),
            scratch_bytes=0 if crossover == NEVER else Shape.of(layer).dequantized_bytes(layer),
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Lay the codes out as the kernels want them, with what was tuned for this GPU."""
        from gptq_loader_kernels.triton.linear import TritonLinear
        from gptq_loader_kernels.triton.tuning import chosen_tiles, multiprocessors

        return TritonLinear(
            layer,
            packed,
            device.torch_name,
            tiles=chosen_tiles(device, layer.bits),
            multiprocessors=multiprocessors(device),
            dtype=_dtype(layer, device),
            tensor_cores=has_tensor_cores(kind_of(device)),
            crossover=chosen_crossover(layer, device),
            expert_tiles=expert_tiles(kind_of(device), layer.bits),
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


def _rank(device: Device) -> int:
    cores = device.type == "rocm" or has_tensor_cores(kind_of(device))
    return RANK if cores else FLOAT16_RANK


def _dtype(layer: LayerSpec, device: Device) -> str:
    return layer.half_dtype if device.type == "cpu" else matmul_dtype(device, layer)


def _note(device: Device, crossover: int) -> str:
    how = (
        "decoded inside the matmul"
        if has_tensor_cores(kind_of(device))
        else "multiplied without tensor cores"
    )
    above = "" if crossover == NEVER else f"; from {crossover} rows on dequantised"
    return f"weights stay packed; {how}{above}"


def _device_reason(device: Device) -> str | None:
    if device.type == "rocm":
        if device.arch in ARCHES:
            return None
        return f"needs {', '.join(ARCHES[:-1])} or {ARCHES[-1]}; this is {device}"
    if device.type != "cuda":
        return f"needs a CUDA or ROCm GPU; this is {device}"
    if device.capability is not None and device.capability < OLDEST:
        return f"needs sm70 or newer, which Triton compiles for; this is {device}"
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
