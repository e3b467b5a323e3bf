"""Quantise a model with GPTQ (Frantar et al., 2022, arXiv:2210.17323) and write a checkpoint.

Importing this package imports no torch: each name is found on first use.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
