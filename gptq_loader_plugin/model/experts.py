"""A mixture's experts as separate linears, where transformers 5 keeps one fused parameter.

Checkpoints of 2023-24 quantise every expert's projections by themselves, and packed weights of
different experts cannot be joined, so the fused module is replaced by this one, which answers the
same call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PackedExperts"]


class PackedExperts(nn.Module):
    """Experts of three linears each: down(activation(gate(x)) * up(x)).

    Args:
        num_experts: how many there are.
        activation: what the fused module applies to the gate.
    """

    def __init__(
        self, num_experts: int, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.activation = activation
        self.experts = nn.ModuleList(nn.ModuleDict() for _ in range(num_experts))

    def place(self, expert: int, role: str, module: nn.Module) -> None:
        """Put one projection in its place; `role` is "gate", "up" or "down"."""
        self._expert(expert)[role] = module

    def missing(self) -> list[str]:
        """Name the projections that are not in place yet."""
        return [
            f"{expert}.{role}"
            for expert in range(self.num_experts)
            for role in ("gate", "up", "down")
            if role not in self._expert(expert)
        ]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Send every token through its experts and add their answers, weighted.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts of each token.
            top_k_weights: [tokens, k], their weights.

        Returns:
            [tokens, hidden].
        """
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # transformers' mark for "not on this rank"
                continue
            tokens, slots = torch.where(top_k_index == expert)
            projections = self._expert(expert)
            x = hidden_states[tokens]
            y = self.activation(projections["gate"](x)) * projections["up"](x)
            y = projections["down"](y) * top_k_weights[tokens, slots, None]
            total.index_add_(0, tokens, y.to(total.dtype))
        return total

    def _expert(self, index: int) -> nn.ModuleDict:
        expert = self.experts[index]
        if not isinstance(expert, nn.ModuleDict):
            raise TypeError(f"expert {index} is a {type(expert).__name__}")
        return expert
