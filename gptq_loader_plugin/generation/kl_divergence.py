"""How far next-token probabilities are from others: Kullback-Leibler divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["kl_divergence"]


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Compute the divergence of each token's probabilities from a reference's.

    Args:
        reference: log-probabilities, float32 [..., vocabulary].
        other: the same, of what is compared.

    Returns:
        In nats [...]; what rounding makes less than zero is zero.
    """
    return (reference.exp() * (reference - other)).sum(-1).clamp_min(0)
