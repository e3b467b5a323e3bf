"""Layers of every width on the CPU, packed, by the native library; without it, torch's operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_kernels._int4 import Int4Kernel
from gptq_loader_kernels._native import (
    COLUMNS,
    held_bits,
    load_library,
    unit_rows,
    unit_words,
    why_not,
)
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Declined

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

__all__ = ["CpuKernel", "gptq_kernels"]

RANK = 70  # above cpu-int4 (50)
BANDWIDTH_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """Multiply by the packed weight with the native library (kernels/csrc/gptq_cpu.cpp)."""

    name: str = "cpu"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept every layer on a CPU, where the library was built."""
        if device.type != "cpu":
            return Declined(self.name, f"runs on a CPU; this is {device}")
        if (reason := why_not()) is not None:
            return Declined(self.name, reason)
        if "avx512_bf16" in device.features:
            dtype, code = "bfloat16", "AVX512-BF16"
        else:
            dtype = "float32"
            code = next(
                (
                    words
                    for flag, words in (("avx512f", "AVX-512"), ("avx2", "AVX2"))
                    if flag in device.features
                ),
                "any processor, slower than with AVX2",
            )
        widened = (
            ""
            if held_bits(layer.bits) == layer.bits
            else f", codes widened from {layer.bits} bits to 8"
        )
        return Accepted(
            self.name,
            RANK,
            dtype=dtype,
            prepared_bytes=_prepared_bytes(layer),
            note=f"weights stay packed; native code for {code}{widened}",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Sort the rows by group and pack them as the library reads them."""
        from gptq_loader_kernels._native_linear import NativeLinear

        return NativeLinear(
            packed,
            in_features=layer.in_features,
            out_features=layer.out_features,
            amx="amx_bf16" in device.features,
        )

    def finish(self, model: PreTrainedModel) -> str:
        """Have a Llama-like model decode in one native call a token; say so, or why not."""
        from gptq_loader_kernels._native_step import install

        reason = install(model)
        if reason is None:
            return "decodes in native steps, one call a token"
        return f"decodes by transformers, layer by layer: {reason}"

    def read_bandwidth(self, size: int, device: Device) -> float | None:  # noqa: ARG002 - the CPU
        """Read `size` bytes of memory with torch's threads: bytes a second of the best round."""
        import torch

        found: float = load_library().gptq_read_bandwidth(
            size, BANDWIDTH_ROUNDS, torch.get_num_threads()
        )
        return found or None


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
    """Offer the native kernel, and torch's operator for where it was not built."""
    return [CpuKernel(), Int4Kernel()]
