"""What the engine attends by, as one object; imports torch."""

from __future__ import annotations

from gptq_loader_kernels.attention.operators import paged_attention, write_cache

__all__ = ["Operators"]


class Operators:
    """Attention over blocks, as `gptq_loader_plugin.kernel.PagedAttention` has it."""

    write_cache = staticmethod(write_cache)
    decode = staticmethod(paged_attention)
