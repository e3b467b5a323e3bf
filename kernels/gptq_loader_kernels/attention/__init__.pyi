# The public names, each with its home; __init__.py finds them there on first use.

from .operators import (
    activation_and_mul,
    add_rms_norm,
    paged_attention,
    rms_norm,
    rotary_and_cache,
    write_cache,
)

__all__ = [
    "activation_and_mul",
    "add_rms_norm",
    "paged_attention",
    "rms_norm",
    "rotary_and_cache",
    "write_cache",
]
