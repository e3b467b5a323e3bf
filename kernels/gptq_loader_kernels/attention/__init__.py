"""Decode attention over a pool of blocks, and the elementwise kernels of a decode step.

Each operation is one operator of torch, so that torch.compile traces through it and a CUDA graph
captures it: Triton runs it where Triton runs, plain torch operations everywhere else. Importing
this package imports neither; each name is found on first use.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
