"""Cut a layer into layers of some of its columns, which read the same x as q, k and v do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from gptq_loader_plugin.kernel import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel, LayerSpec

__all__ = ["check_joined", "cut"]


def cut(
    spec: LayerSpec, packed: PackedLinear, sizes: Sequence[int]
) -> list[tuple[LayerSpec, PackedLinear]]:
    """Cut a layer into layers of so many columns each."""
    parts, at = [], 0
    for size in sizes:
        own = slice(at, at + size)
        part = PackedLinear(
            qweight=packed.qweight[:, own].contiguous(),
            zeros=packed.zeros[:, own].contiguous(),
            scales=packed.scales[:, own].contiguous(),
            g_idx=packed.g_idx,
            bits=packed.bits,
            layout=packed.layout,
            bias=None if packed.bias is None else packed.bias[own],
        )
        parts.append((replace(spec, out_features=size), part))
        at += size
    return parts


def check_joined(
    kernel: Kernel,
    device: Device,
    layer: tuple[LayerSpec, PackedLinear],
    sizes: Sequence[int],
    x: torch.Tensor,
    crossover: int | None = None,
) -> None:
    """Check that layers joined multiply as they do alone, before and after, and share memory."""
    modules = [kernel.prepare(*part, device) for part in cut(*layer, sizes)]
    if crossover is not None:
        for module in modules:
            module.crossover = crossover  # type: ignore[assignment]
    with torch.inference_mode():
        alone = [module(x) for module in modules]
    first, *others = modules
    joined = first.join(others)  # type: ignore[operator] - every kernel here joins
    assert joined is not None
    with torch.inference_mode():
        torch.testing.assert_close(joined(x), torch.cat(alone, dim=-1), rtol=1e-3, atol=1e-3)
        for module, y in zip(modules, alone, strict=True):
            torch.testing.assert_close(module(x), y)
    whole = {it.untyped_storage().data_ptr() for it in joined.buffers()}
    for name, buffer in others[-1].named_buffers():
        if buffer.shape and sizes[-1] in buffer.shape:
            assert buffer.untyped_storage().data_ptr() in whole, name
