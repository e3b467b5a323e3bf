"""Quantise a model with GPTQ (Frantar et al., 2022, arXiv:2210.17323) and write a checkpoint.

Importing this package imports no torch: each name is found on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_loader_plugin.quantize.options import QuantizeOptions
    from gptq_loader_plugin.quantize.run import quantize, quantize_model

__all__ = ["KEPT", "QuantizeOptions", "quantize", "quantize_model"]

KEPT = ".quantize"  # finished blocks, in the output folder until it is complete

_HOMES = {"QuantizeOptions": "options", "quantize": "run", "quantize_model": "run"}


def __getattr__(name: str) -> object:
    """Find a public name in its module, on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
