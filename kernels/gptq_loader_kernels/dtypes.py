"""The dtype that torch's own matmul is fast in on a device, for kernels that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import Device, LayerSpec

__all__ = ["matmul_dtype"]

AMPERE = (8, 0)  # the first CUDA capability with bfloat16 matmuls


def matmul_dtype(device: Device, layer: LayerSpec) -> str:
    """Choose the dtype the device multiplies fast in, without overflow where it can be had."""
    if device.type == "cpu":
        return (
            "bfloat16"
            if "avx512_bf16" in device.features or "bf16" in device.features
            else "float32"
        )
    if device.type == "cuda" and (device.capability or AMPERE) < AMPERE:
        return "float16"
    return layer.half_dtype
