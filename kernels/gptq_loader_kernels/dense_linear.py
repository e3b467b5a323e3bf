"""The module of a dequantised weight; imports torch, so kernels import it inside `prepare`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from gptq_loader_kernels.side_by_side import join_modules

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DenseLinear"]


class DenseLinear(torch.nn.Module):
    """y = x @ weight.T + bias in the weight's dtype; y comes back in x's dtype.

    Args:
        weight: [out_features, in_features].
        bias: [out_features] in the weight's dtype, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features]."""
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

    def join(self, others: Sequence[torch.nn.Module]) -> DenseLinear | None:
        """Join modules of the same x, as `gptq_loader_plugin.kernel.Joinable` has it."""
        return join_modules(self, others, settings=("in_features",), along={"weight": 0, "bias": 0})

    def extra_repr(self) -> str:
        """Say the shape and dtype when printed."""
        return f"{self.in_features}, {self.out_features}, dtype={self.weight.dtype}"
