"""The module over torch's int4 operator; imports torch, so `Int4Kernel.prepare` imports it."""

from __future__ import annotations

import torch

from gptq_loader_kernels.autograd import by_identity, needs_gradient, with_gradient

__all__ = ["Int4Linear"]


class Int4Linear(torch.nn.Module):
    """y = x @ W.T + bias through `aten::_weight_int4pack_mm_for_cpu`, in bfloat16.

    Args:
        words: uint8 [out_features, in_features / 2], packed by the operator's own converter.
        table: bfloat16 [groups, out_features, 2], each group's scale and offset.
        group_size: rows of a group, as the operator is told.
        in_features: the length of x.
        out_features: the length of y.
        permutation: int64 [in_features], the order of x's features in `words`, or None.
        bias: bfloat16 [out_features], or None.
    """

    def __init__(
        self,
        words: torch.Tensor,
        table: torch.Tensor,
        *,
        group_size: int,
        in_features: int,
        out_features: int,
        permutation: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.register_buffer("words", words, persistent=False)
        # Raw bits: the operator takes bfloat16 alone, and a model's .to(dtype) changes no integer.
        self.register_buffer("table", table.view(torch.int16), persistent=False)
        self.register_buffer("permutation", permutation, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.words: torch.Tensor
        self.table: torch.Tensor
        self.permutation: torch.Tensor | None
        self.bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features]."""
        if needs_gradient(x):
            return with_gradient(self, x, by_identity)
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        if self.permutation is not None:
            rows = rows.index_select(1, self.permutation)
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001
            rows.contiguous(), self.words, self.group_size, self.table.view(torch.bfloat16)
        )
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """Say the shape when printed."""
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, 4-bit"
