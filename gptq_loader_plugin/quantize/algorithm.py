"""GPTQ for one weight: Frantar et al., 2022, arXiv:2210.17323, algorithm 1.

Columns are quantised one at a time; the error of each is spread over the columns that are still
to come, by the inverse Hessian of the layer's inputs. Columns with large activations should go
first, and `order` says how: "static" finds the groups' scales beforehand, and then takes columns
in any order, groups as they lie; "group-aware" takes one group after the other, the one with the
largest activation first, and sorts inside each (Gafni et al. 2025, arXiv:2505.14638); "act" sorts
all columns and makes groups of them in that order, which needs a g_idx that most engines no longer
read. How a scale is found is in `scales`, and what improves the result afterwards in `refine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gptq_loader_plugin.errors import QuantizeError
from gptq_loader_plugin.quantize.refine import refine
from gptq_loader_plugin.quantize.scales import best_scales

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.quantize.options import QuantizeOptions

__all__ = ["QuantizedWeight", "error_costs", "quantize_weight"]

BLOCK = 128  # columns whose errors are spread at once, as in the paper
DAMP_STEPS = 10  # times the damping is raised where the Hessian is not positive definite
SMALL_INVERSE = 96  # columns of a triangular matrix that are solved for directly
ROUNDS = 2  # of refinement; a third took another 1 % off a layer's loss, and a second 2 %


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A quantised weight, as a checkpoint holds it.

    Attributes:
        codes: uint8 [K, N], rows in their own order.
        scales: float16 [G, N].
        zeros: uint8 [G, N], true zeros.
        g_idx: int32 [K], the group of each row.
        loss: the squared error of the layer's outputs over calibration, as a share of their square.
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
    target, hessian = weight.t().contiguous(), hessian.clone()
    dead = hessian.diagonal() == 0  # inputs that were never anything but zero
    hessian[dead, dead] = 1
    if not bool(dead.all()):
        target[dead] = 0
    size = columns if options.group_size < 0 else min(options.group_size, columns)
    g_idx = torch.arange(columns) // size
    order = _order(hessian.diagonal(), size, options)
    back = torch.argsort(order)
    groups = g_idx if options.order == "act" else g_idx[order]
    factor = _inverse_factor(hessian[order][:, order], options.damp_percent)
    importance = factor.diagonal().square().reciprocal_()
    static = None
    if options.order == "static":
        static = _static(target, importance[back], size, options)
    codes, scales, zeros = _columns(target[order], factor, importance, groups, static, options)
    codes, groups = codes[back], groups[back]
    if options.effort != "fast":
        greatest = (1 << options.bits) - 1
        codes, scales = refine(
            target, hessian, codes, scales, zeros, groups, greatest=greatest, rounds=ROUNDS
        )
    error = target - (codes - zeros[groups]) * scales[groups]
    square = float((target * (hessian @ target)).sum())
    return QuantizedWeight(
        codes=codes.to(torch.uint8),
        scales=scales.to(torch.float16),
        zeros=zeros.to(torch.uint8),
        g_idx=groups.to(torch.int32),
        loss=float((error * (hessian @ error)).sum()) / square if square else 0.0,
    )


def error_costs(hessian: torch.Tensor, options: QuantizeOptions) -> torch.Tensor:
    """Return what a squared rounding error of each column costs GPTQ: float32 [K].

    Once the columns still to come have made up for an error e of column i, e² / [H⁻¹]'s pivot is
    left of it in the layer's outputs; what a weight loses is the sum of these. So the rounding
    errors of the weights as they are forecast what GPTQ will lose, without running it.

    Args:
        hessian: the mean of x xᵀ over the layer's inputs, float32 [K, K].
        options: order, group size and damping.
    """
    columns, hessian = len(hessian), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    size = columns if options.group_size < 0 else min(options.group_size, columns)
    order = _order(hessian.diagonal(), size, options)
    factor = _inverse_factor(hessian[order][:, order], options.damp_percent)
    costs = factor.diagonal().square().reciprocal()[torch.argsort(order)]
    costs[dead] = 0
    return costs


def _order(diagonal: torch.Tensor, size: int, options: QuantizeOptions) -> torch.Tensor:
    """Return the order in which columns are quantised: int64 [K]."""
    if options.order == "none":
        return torch.arange(len(diagonal))
    if options.order != "group-aware":
        return torch.argsort(diagonal, descending=True, stable=True)
    parts = diagonal.split(size)
    largest = torch.stack([part.max() for part in parts])
    return torch.cat(
        [
            group * size + torch.argsort(parts[group], descending=True, stable=True)
            for group in torch.argsort(largest, descending=True, stable=True).tolist()
        ]
    )


def _columns(
    work: torch.Tensor,
    factor: torch.Tensor,
    importance: torch.Tensor,
    groups: torch.Tensor,
    static: tuple[torch.Tensor, torch.Tensor] | None,
    options: QuantizeOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise column after column; `work` [K, N] is used up, each of its rows a column.

    Returns:
        Codes [K, N], scales and zeros [G, N], all float32.
    """
    columns, rows = work.shape
    greatest = (1 << options.bits) - 1
    count = int(groups.max()) + 1
    codes = torch.empty(columns, rows)
    scales, zeros = static or (torch.empty(count, rows), torch.empty(count, rows))
    listed, diagonal = groups.tolist(), factor.diagonal().tolist()
    for first, last, begins in _blocks(listed, dynamic=static is None):
        if begins:
            end = first + listed.count(listed[first])
            grid = best_scales(work[first:end], importance[first:end], options)
            scales[listed[first]], zeros[listed[first]] = grid
        block = work[first:last]
        errors = torch.empty_like(block)
        for i in range(first, last):
            scale, zero, column = scales[listed[i]], zeros[listed[i]], block[i - first]
            code = torch.div(column, scale).round_().add_(zero).clamp_(0, greatest)
            codes[i] = code
            error = torch.sub(column, code.sub_(zero).mul_(scale), out=errors[i - first])
            error.div_(diagonal[i])
            if i + 1 < last:
                block[i + 1 - first :].addr_(factor[i, i + 1 : last], error, alpha=-1)
        work[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    return codes, scales, zeros


def _blocks(groups: list[int], *, dynamic: bool) -> Iterator[tuple[int, int, bool]]:
    """Cut columns into blocks: first, last, and whether a group's scale is to be found there.

    A block ends where a group does, so that a group's scale sees every error before it.
    """
    first = 0
    while first < len(groups):
        last = min(first + BLOCK, len(groups))
        if dynamic:
            last = first + next(
                (i for i, group in enumerate(groups[first:last]) if group != groups[first]),
                last - first,
            )
        yield first, last, dynamic and (first == 0 or groups[first - 1] != groups[first])
        first = last


def _static(
    weight: torch.Tensor, importance: torch.Tensor, size: int, options: QuantizeOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find every group's scale and zero from the weights [K, N] as they are: each [G, N]."""
    parts = zip(weight.split(size), importance.split(size), strict=True)
    grids = [best_scales(*part, options) for part in parts]
    return torch.stack([scale for scale, _ in grids]), torch.stack([zero for _, zero in grids])


def _inverse_factor(hessian: torch.Tensor, damp_percent: float) -> torch.Tensor:
    """Factor the inverse of the damped Hessian: upper triangular, float32 [K, K].

    Raises:
        QuantizeError: no damping makes the Hessian positive definite.
    """
    # Rows and columns reversed, the lower factor is an upper one: H = M Mᵀ. So with U = M⁻¹,
    # H⁻¹ = Uᵀ U, without an inverse of H, which is less exact and takes twice as long.
    # No matrix is kept longer than it is needed: those of a large model take 1 GB each.
    damped = hessian.flip(0, 1).double()
    diagonal = damped.diagonal().clone()
    mean = float(hessian.diagonal().double().mean())
    damp = damp_percent
    for _ in range(DAMP_STEPS):
        damped.diagonal().copy_(diagonal + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            del damped
            lower = lower.flip(0, 1)  # and nothing else holds the other
            return _inverse_upper(lower).float()
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
