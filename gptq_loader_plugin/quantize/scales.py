"""Find the scale and the zero of a group of weights: a search, weighted by what an error costs.

Of many scales, below and above the one that spans all weights, the one with the least error is
taken, each rounded to float16 as the file holds it. A weight's squared error counts by what GPTQ
pays for it once the weights still to come have made up for it: 1 / [H⁻¹]'s pivot, the diagonal of
its inverse's Cholesky factor. Symmetric codes reach one step further down than up (-4 to 3 with
3 bits), so scales of both signs are tried: a negative one gives that step to the greatest weight
("full range", as AutoRound's and llama.cpp's Q3_K and Q4_0 do). docs/decisions/quantizer.md has
what each gains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gptq_loader_plugin.quantize.options import QuantizeOptions

__all__ = ["best_scales", "least_errors"]

SMALLEST_SCALE = 2.0**-24  # float16's smallest number above zero
# Of the scale that spans every weight. The largest are for the ends of symmetric codes, which do
# not reach as far up as down.
RATIOS = tuple(1.15 - 0.05 * step for step in range(16))


def best_scales(
    weights: torch.Tensor, importance: torch.Tensor, options: QuantizeOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the scale and zero of a group with the least weighted squared error: each [N].

    Args:
        weights: the group, float32 [rows, N].
        importance: what a squared error of each row costs, float32 [rows].
        options: bits and sym.
    """
    scale, zero, _ = _search(weights, importance[:, None], options)
    return scale, zero


def least_errors(
    weights: torch.Tensor, importance: torch.Tensor, size: int, options: QuantizeOptions
) -> torch.Tensor:
    """Add up what is lost with each group's best scale: the weighted squared errors, [N].

    Args:
        weights: float32 [K, N].
        importance: what a squared error of each row costs, float32 [K].
        size: rows of a group; it divides K.
        options: bits and sym.
    """
    rows, columns = weights.shape
    by_group = weights.reshape(rows // size, size, columns).transpose(0, 1).reshape(size, -1)
    spread = importance.reshape(rows // size, size).t().repeat_interleave(columns, dim=1)
    _, _, errors = _search(by_group, spread, options)
    return errors.reshape(-1, columns).sum(dim=0)


def _search(
    weights: torch.Tensor, importance: torch.Tensor, options: QuantizeOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find each column's scale, zero and error; weights [rows, N], importance [rows, N or 1]."""
    greatest = (1 << options.bits) - 1
    low, high = weights.amin(dim=0).clamp_max_(0), weights.amax(dim=0).clamp_min_(0)
    scale, zero = _span(low, high, options)
    lowest = torch.full_like(scale, torch.inf)
    codes, shared = torch.empty_like(weights), importance.shape[1] == 1
    signs = (1, -1) if options.sym else (1,)
    for factor in (sign * ratio for sign in signs for ratio in RATIOS):
        scale_now, zero_now = _span(low * abs(factor), high * abs(factor), options)
        if factor < 0:
            scale_now = -scale_now
        torch.div(weights, scale_now, out=codes).round_().add_(zero_now)
        codes.clamp_(0, greatest).sub_(zero_now).mul_(scale_now)
        codes.sub_(weights).square_()
        error = importance[:, 0] @ codes if shared else codes.mul_(importance).sum(dim=0)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        scale = torch.where(better, scale_now, scale)
        zero = torch.where(better, zero_now, zero)
    return scale, zero, lowest


def _span(
    low: torch.Tensor, high: torch.Tensor, options: QuantizeOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Span a range, from a group's smallest weight to its greatest: scale and zero, each [N]."""
    greatest = (1 << options.bits) - 1
    if options.sym:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / greatest).half().float()
    scale = torch.where(scale > 0, scale, torch.full_like(scale, SMALLEST_SCALE))
    if options.sym:
        return scale, torch.full_like(scale, (greatest + 1) / 2)
    return scale, torch.clamp(torch.round(-low / scale), 0, greatest)
