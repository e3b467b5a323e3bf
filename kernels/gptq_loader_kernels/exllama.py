"""4-bit layers on a GPU through exllamav2's compiled extension, where it is installed.

What exllamav2 0.3.2 (its newest and last) can run was read in its sources, exllamav2_ext/cuda:
`ext_qmatrix.cpp` and `q_matrix.cu`. It is never imported to find out whether it is there, because
importing exllamav2 without a compiled extension starts a compile.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Declined

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

__all__ = ["ExllamaKernel", "gptq_kernels"]

RANK = 80  # the fastest for one token at a time, by every report on 4-bit GPTQ
EXTENSION = "exllamav2_ext"
BITS = 4
MULTIPLE = 32  # the kernel takes 32 rows a step and has no tail
MOST_ROWS = 65_535  # rows are permuted by unsigned 16-bit numbers
SMALLEST_GROUP = 32
OLDEST = (6, 0)  # the first with the half-precision atomics its sums need


@dataclass(frozen=True, slots=True)
class ExllamaKernel:
    """Multiply in float16 by exllamav2's 4-bit GPTQ kernel."""

    name: str = "exllama"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept what exllamav2 computes rightly, where its extension is compiled."""
        reason = _device_reason(device) or _layer_reason(layer) or _missing(device)
        if reason is not None:
            return Declined(self.name, reason)
        padded = -(-layer.out_features // MULTIPLE) * MULTIPLE
        codes = layer.in_features * padded // 2
        tables = layer.groups * padded * 5 // 2 + 4 * layer.in_features
        cast = "" if layer.scales_dtype == "float16" else f"; {layer.scales_dtype} cast to float16"
        return Accepted(
            self.name,
            RANK,
            dtype="float16",
            prepared_bytes=codes + tables,
            note=f"weights stay packed; exllamav2's 4-bit kernel{cast}",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Hand the layer's tensors to the extension, which reorders them in place on the GPU."""
        from gptq_loader_kernels._exllama_linear import ExllamaLinear

        return ExllamaLinear(layer, packed, device.torch_name)


def _device_reason(device: Device) -> str | None:
    if device.type not in ("cuda", "rocm"):
        return f"needs a CUDA or ROCm GPU; this is {device}"
    if device.capability is not None and device.capability < OLDEST:
        return f"needs sm{OLDEST[0]}{OLDEST[1]} or newer; this is {device}"
    return None


def _layer_reason(layer: LayerSpec) -> str | None:  # noqa: PLR0911 - one for each limit
    if layer.bits != BITS:
        return f"exllamav2's GPTQ kernels are 4-bit only; this layer is {layer.bits}-bit"
    if layer.in_features % MULTIPLE:
        return f"in_features {layer.in_features} is not a multiple of {MULTIPLE}"
    if layer.in_features > MOST_ROWS:
        return f"in_features {layer.in_features} is more than {MOST_ROWS}, its 16-bit limit"
    if layer.groups > 1:
        size = layer.group_rows[1]
        if not layer.even_groups:
            return (
                f"it takes groups of equal size; this layer's have {layer.group_rows[0]} to {size} "
                "rows"
            )
        if size & (size - 1) or size < SMALLEST_GROUP:
            return (
                f"it derives a power-of-two group size from {SMALLEST_GROUP} up; groups of {size} "
                "would be wrong"
            )
    if layer.zero_range[0] < 1:
        return "it stores zero - 1; this layer's zeros of 0 cannot be represented"
    return None


def _missing(device: Device) -> str | None:
    built = device.assume_built
    if built is None:
        built = importlib.util.find_spec(EXTENSION) is not None
    if built:
        return None
    return (
        f"{EXTENSION} is not installed: take the exllamav2 wheel for your torch and CUDA from its "
        "releases, or build it (which needs nvcc)"
    )


@hookimpl
def gptq_kernels() -> list[Kernel]:
    """Offer the ExLlama kernel."""
    return [ExllamaKernel()]
