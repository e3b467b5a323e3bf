"""Layers of every width on the CPU, packed, by the native library; without it, torch's operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_kernels.cpu.int4 import Int4Kernel
from gptq_loader_kernels.cpu.library import (
    COLUMNS,
    Activations,
    held_bits,
    load_library,
    unit_rows,
    unit_words,
    why_not,
)
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Declined, Finished

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

__all__ = ["CpuKernel", "gptq_kernels"]

# By a processor's flags, the best first; with none of them x is multiplied in float32.
INSTRUCTIONS = {
    "avx512_vnni": "AVX512-VNNI",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "i8mm": "NEON with products of matrices",
    "asimddp": "NEON with dot products",
}
RANK = 70  # above cpu-int4 (50)
INT8_RANK = 0  # below everything: by name alone
BANDWIDTH_ROUNDS = 5
# Families whose logits are their head's, of what the native steps run: none scales or caps them.
_PLAIN_HEADS = (
    "Dots1", "Glm", "Glm4", "Glm4Moe", "GptOss", "Llama", "MiniMaxM2", "Mistral", "Mixtral",
    "Olmo2", "Olmoe", "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "SeedOss", "SmolLM3",
    "StableLm", "Starcoder2",
)  # fmt: skip
DECODERS = tuple(f"{name}ForCausalLM" for name in _PLAIN_HEADS)


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """Multiply by the packed weight with the native library (kernels/csrc/gemv.cpp)."""

    name: str = "cpu"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept every layer on a CPU, where the library was built."""
        if device.type != "cpu":
            return Declined(self.name, f"runs on a CPU; this is {device}")
        if (reason := why_not()) is not None:
            return Declined(self.name, reason)
        if "avx512_bf16" in device.features:
            dtype, code = "bfloat16", "AVX512-BF16"
            if "amx_bf16" in device.features:
                code += " and AMX"
        else:
            dtype, code = "float32", "any processor, slower than with AVX2"
            for flag, words in INSTRUCTIONS.items():
                if flag in device.features:
                    code = f"{words}, activations in 16 bits"
                    break
        widened = "" if held_bits(layer.bits) == layer.bits else f"; {layer.bits} bits held in 8"
        return Accepted(
            self.name,
            RANK,
            dtype=dtype,
            prepared_bytes=_prepared_bytes(layer),
            note=f"weights stay packed; native code for {code}{widened}",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Sort the rows by group and pack them as the library reads them."""
        from gptq_loader_kernels.cpu.linear import NativeLinear

        del device
        return NativeLinear(packed, in_features=layer.in_features, out_features=layer.out_features)

    def finish(self, model: PreTrainedModel) -> Finished:
        """Have a model decode in one native call a token; note why not elsewhere."""
        from gptq_loader_kernels.cpu.install import install

        decoder = install(model)
        if isinstance(decoder, str):
            return Finished(f"decodes by transformers, layer by layer: {decoder}")
        return Finished("decodes in native steps, one call a token", batcher=decoder)

    def top_logits_bytes(self, config: Mapping[str, Any], head: LayerSpec) -> int:
        """Count the head's copy in 8 bits, for models that decode natively."""
        names, hidden = config.get("architectures") or [""], head.in_features
        heads = config.get("num_attention_heads") or 1
        head_dim = config.get("head_dim") or hidden // heads
        if names[0] not in DECODERS or hidden % 16 or head_dim % 16 or head_dim > 256:
            return 0
        return _prepared_bytes(head) + 4 * head.out_features

    def add_top_logits(self, model: PreTrainedModel) -> int:
        """Copy the head in 8 bits, where the model decodes natively."""
        from gptq_loader_kernels.cpu.head import RowsLinear, TopLogitsLinear

        head = model.get_output_embeddings()
        if type(model).__name__ not in DECODERS or type(head) is not RowsLinear:
            return 0
        short = TopLogitsLinear.of(head)
        model.set_output_embeddings(short)
        return short.extra_bytes

    def read_bandwidth(self, size: int, device: Device) -> float | None:  # noqa: ARG002 - the CPU
        """Read `size` bytes of memory with torch's threads: bytes a second of the best round."""
        import torch

        speed: float = load_library().gptq_read_bandwidth(
            size, BANDWIDTH_ROUNDS, torch.get_num_threads()
        )
        return speed or None


@dataclass(frozen=True, slots=True)
class CpuInt8Kernel:
    """Multiply by the packed weight, activations rounded to 8 bits (kernels/csrc/vnni.cpp).

    Never chosen by itself: its answers are less exact (docs/decisions/int8.md).
    """

    name: str = "cpu-int8"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept every layer on a CPU with AVX512-VNNI and without something better."""
        if device.type != "cpu":
            return Declined(self.name, f"runs on a CPU; this is {device}")
        if (reason := why_not()) is not None:
            return Declined(self.name, reason)
        if "avx512_vnni" not in device.features:
            return Declined(self.name, "needs AVX512-VNNI; this CPU has none")
        if "amx_bf16" in device.features:
            return Declined(self.name, "exact products are faster; this CPU has AMX")
        return Accepted(
            self.name,
            INT8_RANK,
            dtype="bfloat16",
            prepared_bytes=_prepared_bytes(layer),
            note="weights stay packed; activations rounded to 8 bits, integer products",
            activations="int8",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Sort the rows by group and pack them as the library reads them."""
        from gptq_loader_kernels.cpu.linear import NativeLinear

        del device
        return NativeLinear(
            packed,
            in_features=layer.in_features,
            out_features=layer.out_features,
            activations=Activations.INT8,
        )

    def finish(self, model: PreTrainedModel) -> Finished:
        """Have a model decode in native steps, whose products are not rounded."""
        return CpuKernel().finish(model)


def _prepared_bytes(layer: LayerSpec) -> int:
    """Count the bytes once prepared, exact where groups fill whole units, else the most."""
    bits = held_bits(layer.bits)
    size = unit_rows(bits)
    columns = -(-layer.out_features // COLUMNS) * COLUMNS
    rows = layer.in_features
    if layer.group_unit % size:
        rows += layer.groups * (size - 1)
    words = rows // size * unit_words(bits) * 4 * columns
    scale_bytes = 2 if layer.scales_dtype == "float16" else 4
    return words + layer.groups * columns * (scale_bytes + 1) + 4 * rows


@hookimpl
def gptq_kernels() -> list[Kernel]:
    """Offer the native kernels, and torch's operator for where they were not built."""
    return [CpuKernel(), CpuInt8Kernel(), Int4Kernel()]
