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
SMALL_INVERSE = 96  # columns of a triangular matrix that are solved for directly
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
    work, hessian = weight.t().contiguous(), hessian.clone()
    dead = hessian.diagonal() == 0  # inputs that were never anything but zero
    hessian[dead, dead] = 1
    if not bool(dead.all()):
        work[dead] = 0
    size = columns if options.group_size < 0 else min(options.group_size, columns)
    g_idx = torch.arange(columns) // size
    order = torch.arange(columns)
    if options.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    static = _static(work, size, options) if options.static_groups else None
    work, hessian = work[order], hessian[order][:, order]
    groups = g_idx[order] if static is not None else g_idx
    factor = _inverse_factor(hessian, options.damp_percent)
    codes, scales, zeros, loss = _columns(work, factor, groups, size, static, options)
    back = torch.argsort(order)
    return QuantizedWeight(
        codes=codes[back],
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
    """Quantise column after column; `work` [K, N] is used up, each of its rows a column."""
    columns, rows = work.shape
    greatest = (1 << options.bits) - 1
    count = int(groups.max()) + 1
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    scales = torch.empty(count, rows)
    zeros = torch.empty(count, rows)
    if static is not None:
        scales, zeros = static
    # A block ends where a group does, so that a group's scale sees every error before it.
    step = BLOCK if static is not None or size % BLOCK == 0 else min(size, BLOCK)
    loss = 0.0
    listed, diagonal = groups.tolist(), factor.diagonal().tolist()
    for first in range(0, columns, step):
        last = min(first + step, columns)
        block = work[first:last]
        errors = torch.empty_like(block)
        for i in range(first, last):
            group = listed[i]
            if static is None and i % size == 0:
                scales[group], zeros[group] = _best_grid(work[i : i + size], options)
            scale, zero, column = scales[group], zeros[group], block[i - first]
            code = torch.div(column, scale).round_().add_(zero).clamp_(0, greatest)
            codes[i] = code
            error = torch.sub(column, code.sub_(zero).mul_(scale), out=errors[i - first])
            error.div_(diagonal[i])
            if i + 1 < last:
                block[i + 1 - first :].addr_(factor[i, i + 1 : last], error, alpha=-1)
        loss += float(errors.square().sum())
        work[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    return codes, scales.to(torch.float16), zeros.to(torch.uint8), loss / rows


def _best_grid(
    weights: torch.Tensor, options: QuantizeOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the scale and zero with the least squared error for a group [rows, N]: each [N]."""
    greatest = (1 << options.bits) - 1
    low, high = weights.amin(dim=0).clamp_max_(0), weights.amax(dim=0).clamp_min_(0)
    scale, zero = _grid(low, high, options)
    lowest = torch.full_like(scale, torch.inf)
    codes = torch.empty_like(weights)
    for shrink in SHRINK:
        scale_now, zero_now = _grid(low * shrink, high * shrink, options)
        torch.div(weights, scale_now, out=codes).round_().add_(zero_now)
        codes.clamp_(0, greatest).sub_(zero_now).mul_(scale_now)
        error = codes.sub_(weights).square_().sum(dim=0)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        scale = torch.where(better, scale_now, scale)
        zero = torch.where(better, zero_now, zero)
    return scale, zero


def _grid(
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


def _static(
    weight: torch.Tensor, size: int, options: QuantizeOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find every group's scale and zero from the weights [K, N] as they are: each [G, N]."""
    grids = [_best_grid(part, options) for part in weight.split(size)]
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
        # Rows and columns reversed, the lower factor is an upper one: H = M Mᵀ. So with U = M⁻¹,
        # H⁻¹ = Uᵀ U, without an inverse of H, which is less exact and takes twice as long.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            return _inverse_upper(lower.flip(0, 1)).float()
        damp *= 2
    raise QuantizeError(
        f"the Hessian of a layer is not positive definite, even damped by {damp:.0%}",
        hint="give more or longer calibration samples, or a larger damp_percent",
    )


def _inverse_upper(upper: torch.Tensor) -> torch.Tensor:
    """Invert an upper triangular matrix [K, K] by its quarters, at the speed of products."""
    size, half = len(upper), len(upper) // 2
    if size <= SMALL_INVERSE:
        eye = torch.eye(size, dtype=upper.dtype)
        small: torch.Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
        return small
    inverse = torch.zeros_like(upper)
    first = inverse[:half, :half] = _inverse_upper(upper[:half, :half])
    last = inverse[half:, half:] = _inverse_upper(upper[half:, half:])
    inverse[:half, half:] = -(first @ upper[:half, half:] @ last)
    return inverse
