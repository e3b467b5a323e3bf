"""4-bit layers on a GPU through exllamav2's compiled extension, where it is installed.

What exllamav2 0.3.2 (its newest and last) can run was read in its sources, exllamav2_ext/cuda:
`ext_qmatrix.cpp`, `q_matrix.cu`, `q_gemm.cu` and `q_gemm_kernel_gptq.cuh`. Most of its limits it
does not check itself: past them it answers, and wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from gptq_loader_kernels.exllama.extension import find_extension
from gptq_loader_kernels.exllama.shape import MULTIPLE, dequantised_rows
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Declined, Finished
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from gptq_loader_kernels.exllama.linear import Scratch
    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

__all__ = ["ExllamaKernel", "gptq_kernels"]

RANK = 80  # the fastest for one token at a time, by every report on 4-bit GPTQ
# It computes in float16, which a bfloat16 model's activations may overflow: there Triton (60)
# goes before it, because it computes in bfloat16, and what dequantises comes after.
CAST_RANK = 55
BITS = 4  # it counts 8 rows a word, whatever the config says
MAX_ROWS = 65_535  # rows are permuted by unsigned 16-bit numbers
SMALLEST_GROUP = 32  # a step reads one row of scales
ZEROS = (1, 15)  # it stores zero - 1 in four bits and adds the one back without a wrap
OLDEST = (6, 0)  # that its wheels are built for


@dataclass(frozen=True, slots=True)
class ExllamaKernel:
    """Multiply in float16 by exllamav2's 4-bit GPTQ kernel.

    Attributes:
        name: the kernel's name.
        scratches: the scratch memory of each device, alive as long as a layer that uses it.
    """

    name: str = "exllama"
    scratches: WeakValueDictionary[str, Scratch] = field(
        default_factory=WeakValueDictionary, repr=False, compare=False
    )

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept what exllamav2 computes rightly, where its extension is compiled."""
        reason = _device_reason(device) or _layer_reason(layer) or _missing(device)
        if reason is not None:
            return Declined(self.name, reason)
        note = "weights stay packed; computes in float16"
        if layer.half_dtype != "float16":
            note += f", cast from {layer.half_dtype}"
        if device.assume_built is None and find_extension() == "to be built":
            note += "; compiled first, for minutes"
        return Accepted(
            self.name,
            RANK if layer.half_dtype == "float16" else CAST_RANK,
            dtype="float16",
            prepared_bytes=_prepared_bytes(layer),
            scratch_bytes=_scratch_bytes(layer),
            note=note,
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Copy the layer's tensors for the extension, which reorders them in place on the GPU."""
        from gptq_loader_kernels.exllama.linear import ExllamaLinear, Scratch

        scratch = self.scratches.setdefault(device.torch_name, Scratch(device.torch_name))
        return ExllamaLinear(layer, packed, device=device.torch_name, scratch=scratch)

    def finish(self, model: PreTrainedModel) -> Finished:
        """Hand over every layer, now that the largest is known."""
        from gptq_loader_kernels.exllama.linear import ExllamaLinear

        for module in model.modules():
            if isinstance(module, ExllamaLinear):
                module.hand_over()
        shared = sum(scratch.nbytes for scratch in self.scratches.values())
        return Finished(
            f"prompts dequantise one layer at a time, in {write_size(shared)} that all share"
        )


def _device_reason(device: Device) -> str | None:
    if device.type not in ("cuda", "rocm"):
        return f"needs a CUDA or ROCm GPU; this is {device}"
    if device.capability is not None and device.capability < OLDEST:
        return f"needs sm{OLDEST[0]}{OLDEST[1]} or newer; this is {device}"
    return None


def _layer_reason(layer: LayerSpec) -> str | None:  # noqa: PLR0911 - one for each limit
    if layer.bits != BITS:
        return f"{layer.bits}-bit; ExLlama takes {BITS}-bit only"
    if layer.in_features % MULTIPLE:
        return f"{layer.in_features} inputs; ExLlama takes multiples of {MULTIPLE}"
    if layer.in_features > MAX_ROWS:
        return f"{layer.in_features} inputs; ExLlama takes up to {MAX_ROWS}"
    smallest, largest = layer.group_rows
    if layer.groups > 1 and not layer.even_groups:
        return f"groups of {smallest} to {largest} rows; ExLlama takes groups of one size"
    if layer.groups > 1 and (largest & (largest - 1) or largest < SMALLEST_GROUP):
        return f"groups of {largest}; ExLlama takes powers of two from {SMALLEST_GROUP} up"
    low, high = layer.zero_range
    if low < ZEROS[0] or high > ZEROS[1]:
        return f"zeros from {low} to {high}; ExLlama takes {ZEROS[0]} to {ZEROS[1]}"
    return None


def _missing(device: Device) -> str | None:
    if device.assume_built:
        return None
    if device.assume_built is False:
        return "needs ExLlamaV2's compiled extension, taken here as not built"
    match find_extension():
        case "no package":
            return "its build was asked for, and ExLlamaV2 is not installed: pip install exllamav2"
        case "no extension":
            return "ExLlamaV2's compiled extension is not installed, nor was its build asked for"
        case "built" | "to be built":
            return None


def _prepared_bytes(layer: LayerSpec) -> int:
    """Count the bytes on the GPU once prepared, the scratch that layers share left out."""
    columns = -(-layer.out_features // MULTIPLE) * MULTIPLE
    codes = layer.in_features * columns // 2
    tables = layer.groups * columns * 5 // 2  # float16 scales, 4-bit zeros
    biases = 2 * columns + 2 * layer.out_features * layer.bias
    permutations = 4 * layer.in_features if layer.groups > 1 and layer.desc_act else 0
    return codes + tables + biases + permutations


def _scratch_bytes(layer: LayerSpec) -> int:
    """Count what the layer is dequantised in for products of many rows."""
    columns = -(-layer.out_features // MULTIPLE) * MULTIPLE
    return 2 * layer.in_features * columns if dequantised_rows(layer.in_features, columns) else 0


@hookimpl
def gptq_kernels() -> list[Kernel]:
    """Offer the ExLlama kernel."""
    return [ExllamaKernel()]
