"""Which modules of a model are linear layers, and their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


__all__ = ["linear_shape"]


def linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear module; GPT-2's Conv1D is one, transposed."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    return None
