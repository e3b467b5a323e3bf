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

__all__ = ["best_scales"]

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
    greatest = (1 << options.bits) - 1
    low, high = weights.amin(dim=0).clamp_max_(0), weights.amax(dim=0).clamp_min_(0)
    scale, zero = _span(low, high, options)
    lowest = torch.full_like(scale, torch.inf)
    codes = torch.empty_like(weights)
    signs = (1, -1) if options.sym else (1,)
    for factor in (sign * ratio for sign in signs for ratio in RATIOS):
        scale_now, zero_now = _span(low * abs(factor), high * abs(factor), options)
        if factor < 0:
            scale_now = -scale_now
        torch.div(weights, scale_now, out=codes).round_().add_(zero_now)
        codes.clamp_(0, greatest).sub_(zero_now).mul_(scale_now)
        error = importance @ codes.sub_(weights).square_()
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        scale = torch.where(better, scale_now, scale)
        zero = torch.where(better, zero_now, zero)
    return scale, zero


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
