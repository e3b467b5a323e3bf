"""Offer attention over blocks of keys and values, on every device torch computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import Device, PagedAttention

__all__ = ["gptq_paged_attention"]


@hookimpl(trylast=True)
def gptq_paged_attention(device: Device) -> PagedAttention:
    """Offer Triton's kernels where Triton runs, and plain torch operations elsewhere."""
    del device  # each operator looks at its tensors
    from gptq_loader_kernels.attention.paged import Operators

    return Operators()
