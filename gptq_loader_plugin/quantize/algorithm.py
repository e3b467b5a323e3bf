"""GPTQ for one weight: Frantar et al., 2022, arXiv:2210.17323, algorithm 1.

Columns are quantised one at a time; the error of each is spread over the columns that are still
to come, by the inverse Hessian of the layer's inputs. With act-order the columns with the largest
activations go first. A group's scale is found when its first column comes, from the weights as
the errors so far have left them, rounded to float16 as the file will hold it; of some scales
smaller than the one that spans all weights, the one with the least squared error is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gptq_loader_plugin.errors import QuantizeError

if TYPE_CHECKING:
    from gptq_loader_plugin.quantize.options import QuantizeOptions

__all__ = ["QuantizedWeight", "quantize_weight"]

BLOCK = 128  # columns whose errors are spread at once, as in the paper
DAMP_STEPS = 10  # times the damping is raised where the Hessian is not positive definite
SMALLEST_SCALE = 2.0**-24  # float16's smallest number above zero
# A scale that spans every weight of a group wastes codes on the few largest. Trying smaller ones
# took SmolLM2-135M at 3 bits, groups of 128, from a perplexity of 52.8 to 33.5, and at 4 bits,
# groups of 64, from 25.5 to 24.5 (docs/decisions/scale-search.md).
SHRINK = tuple(1 - 0.025 * step for step in range(17))


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A quantised weight, as a checkpoint holds it.

    Attributes:
        codes: uint8 [K, N], rows in their own order.
        scales: float16 [G, N].
        zeros: uint8 [G, N], true zeros.
        g_idx: int32 [K], the group of each row.
        loss: the mean squared error of the layer's outputs, by the Hessian.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    loss: float

    def dequantize(self) -> torch.Tensor:
        """Compute the weight: float32 [N, K]."""
        groups = self.g_idx.long()
        weight = (self.codes.float() - self.zeros.float()[groups]) * self.scales.float()[groups]
        return weight.t().contiguous()

    def split(self, columns: list[int]) -> list[QuantizedWeight]:
        """Cut a weight that was quantised for several layers into theirs, by their columns."""
        parts = zip(
            self.codes.split(columns, dim=1),
            self.scales.split(columns, dim=1),
            self.zeros.split(columns, dim=1),
            strict=True,
        )
        return [
            QuantizedWeight(
                codes.contiguous(),
                scales.contiguous(),
                zeros.contiguous(),
                self.g_idx.clone(),  # files hold one for each layer
                self.loss,
            )
            for codes, scales, zeros in parts
        ]


def quantize_weight(
    weight: torch.Tensor, hessian: torch.Tensor, options: QuantizeOptions
) -> QuantizedWeight:
    """Quantise one weight, or several that share their input, stacked.

    Args:
        weight: float32 [N, K]; rows are independent of each other.
        hessian: float32 [K, K], the mean of x xᵀ over the layer's inputs.
        options: bits, groups, order and damping.

    Raises:
        QuantizeError: the Hessian is not finite, or no damping makes it positive definite.
    """
    columns = weight.shape[1]
    if not bool(torch.isfinite(hessian).all()) or not bool(torch.isfinite(weight).all()):
        raise QuantizeError(
            "the calibration gave values that are not finite",
            hint="quantise a float32 or bfloat16 model that runs without overflow",
        )
    work, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0  # inputs that were never anything but zero
    hessian[dead, dead] = 1
    if not bool(dead.all()):
        work[:, dead] = 0
    size = columns if options.group_size < 0 else min(options.group_size, columns)
    g_idx = torch.arange(columns) // size
    order = torch.arange(columns)
    if options.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    work, hessian = work[:, order], hessian[order][:, order]
    static = _static(weight, size, options) if options.static_groups else None
    groups = g_idx[order] if static is not None else g_idx
    factor = _inverse_factor(hessian, options.damp_percent)
    codes, scales, zeros, loss = _columns(work, factor, groups, size, static, options)
    back = torch.argsort(order)
    return QuantizedWeight(
        codes=codes.t()[back].contiguous(),
        scales=scales,
        zeros=zeros,
        g_idx=groups[back].to(torch.int32),
        loss=loss,
    )


def _columns(
    work: torch.Tensor,
    factor: torch.Tensor,
    groups: torch.Tensor,
    size: int,
    static: tuple[torch.Tensor, torch.Tensor] | None,
    options: QuantizeOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Quantise column after column; `work` is used up."""
    rows, columns = work.shape
    greatest = (1 << options.bits) - 1
    count = int(groups.max()) + 1
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(count, rows)
    zeros = torch.empty(count, rows)
    if static is not None:
        scales, zeros = static
    # A block ends where a group does, so that a group's scale sees every error before it.
    step = BLOCK if static is not None or size % BLOCK == 0 else min(size, BLOCK)
    loss = 0.0
    listed = groups.tolist()
    for first in range(0, columns, step):
        last = min(first + step, columns)
        block = work[:, first:last]
        errors = torch.empty_like(block)
        for i in range(first, last):
            group = listed[i]
            if static is None and i % size == 0:
                scales[group], zeros[group] = _best_grid(work[:, i : i + size], options)
            column = block[:, i - first]
            scale, zero = scales[group], zeros[group]
            code = torch.clamp(torch.round(column / scale) + zero, 0, greatest)
            codes[:, i] = code.to(torch.uint8)
            error = (column - (code - zero) * scale) / factor[i, i]
            block[:, i - first :] -= torch.outer(error, factor[i, i:last])
            errors[:, i - first] = error
        loss += float(errors.square().sum())
        work[:, last:] -= errors @ factor[first:last, last:]
    return codes, scales.to(torch.float16), zeros.to(torch.uint8), loss / rows


def _best_grid(
    weights: torch.Tensor, options: QuantizeOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the scale and zero with the least squared error for a group [N, rows]: each [N]."""
    greatest = (1 << options.bits) - 1
    scale, zero = _grid(weights, options)
    lowest = torch.full_like(scale, torch.inf)
    for shrink in SHRINK:
        scale_now, zero_now = _grid(weights, options, shrink=shrink)
        codes = torch.round(weights / scale_now[:, None]).add_(zero_now[:, None])
        codes.clamp_(0, greatest).sub_(zero_now[:, None]).mul_(scale_now[:, None])
        error = codes.sub_(weights).square_().sum(dim=1)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        scale = torch.where(better, scale_now, scale)
        zero = torch.where(better, zero_now, zero)
    return scale, zero


def _grid(
    weights: torch.Tensor, options: QuantizeOptions, *, shrink: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Span a share of a group's range, from its smallest weight to its greatest: each [N]."""
    greatest = (1 << options.bits) - 1
    low = weights.amin(dim=1).clamp_max(0) * shrink
    high = weights.amax(dim=1).clamp_min(0) * shrink
    if options.sym:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / greatest).half().float()
    scale = torch.where(scale > 0, scale, torch.full_like(scale, SMALLEST_SCALE))
    if options.sym:
        return scale, torch.full_like(scale, (greatest + 1) / 2)
    return scale, torch.clamp(torch.round(-low / scale), 0, greatest)


def _static(
    weight: torch.Tensor, size: int, options: QuantizeOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find every group's scale and zero from the weights as they are: each [G, N]."""
    grids = [_best_grid(part, options) for part in weight.split(size, dim=1)]
    return torch.stack([scale for scale, _ in grids]), torch.stack([zero for _, zero in grids])


def _inverse_factor(hessian: torch.Tensor, damp_percent: float) -> torch.Tensor:
    """Factor the inverse of the damped Hessian: upper triangular, float32 [K, K].

    Raises:
        QuantizeError: no damping makes the Hessian positive definite.
    """
    exact = hessian.double()
    mean = float(exact.diagonal().mean())
    damp = damp_percent
    for _ in range(DAMP_STEPS):
        damped = exact.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                factor: torch.Tensor = upper.float()
                return factor
        damp *= 2
    raise QuantizeError(
        f"the Hessian of a layer is not positive definite, even damped by {damp:.0%}",
        hint="give more or longer calibration samples, or a larger damp_percent",
    )
