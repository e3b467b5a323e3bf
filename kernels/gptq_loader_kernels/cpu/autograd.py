"""Gradients through a packed layer of the native library, which unpacks its weight: exact."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from gptq_loader_kernels.cpu.library import COLUMNS

__all__ = ["by_unpacking"]

UNPACKED_BYTES = 16 << 20  # of the weight at a time: they stay in a large cache
FLOAT32 = 0  # the library's name for it


def by_unpacking(module: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - a NativeLinear
    """Multiply by the weight as the native library unpacks it: exact."""
    layer = module.filled()
    rows, columns = module.in_features, module.out_features
    tiles = -(-columns // COLUMNS)
    step = max(UNPACKED_BYTES // (4 * rows * COLUMNS), 1)
    back = gradient.new_zeros(len(gradient), rows)
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        weight = gradient.new_empty(rows, count * COLUMNS)
        module._library.gptq_unpack(  # noqa: SLF001
            ctypes.addressof(layer),
            first,
            count,
            weight.data_ptr(),
            FLOAT32,
            module._isa,  # noqa: SLF001
            torch.get_num_threads(),
        )
        part = gradient[:, first * COLUMNS :][:, : count * COLUMNS]
        back.addmm_(part, weight[:, : part.shape[1]].t())
    return back
