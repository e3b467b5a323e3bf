"""What the engine computes by between its products, as one object; imports torch."""

from __future__ import annotations

from gptq_loader_kernels.attention import operators

__all__ = ["Operators"]


class Operators:
    """The operators of a decode step, as `gptq_loader_plugin.kernel.FusedOperators` has them."""

    write_cache = staticmethod(operators.write_cache)
    decode = staticmethod(operators.paged_attention)
    rms_norm = staticmethod(operators.rms_norm)
    add_rms_norm = staticmethod(operators.add_rms_norm)
    rotary_and_cache = staticmethod(operators.rotary_and_cache)
    activation_and_mul = staticmethod(operators.activation_and_mul)
