"""Improve a quantised weight against the Hessian itself, after GPTQ has been through it once.

GPTQ decides each code for good, and each scale before the codes that it is for. For one row of a
layer, w of K weights with scales s of G groups, what is lost is

    L(c, s) = (w - C s)ᵀ H (w - C s),    C [K, G] = (codes - zero) in their group's column, else 0

Two steps make it smaller in turn, and neither can make it larger but by the rounding of scales:

* the scales, codes fixed, in closed form: s = (Cᵀ H C)⁻¹ Cᵀ H w, of all groups of a row at once;
* the codes, scales fixed, one coordinate after the other (QuantEase, Behdin et al. 2023,
  arXiv:2309.01885): where all other weights stay, L is a parabola in weight i with its minimum at
  q_i + [H (w - q)]_i / H_ii, and the code nearest to it is the best there is.

FOEM's term (arXiv:2507.11017), which makes GPTQ's pass look at the weights before compensation,
gained nothing here: a step of these has the whole first-order term, exactly.
"""

from __future__ import annotations

import torch

__all__ = ["refine"]

BLOCK = 64  # rows whose changes reach the other rows at once
SYSTEM_BYTES = 256 << 20  # of the systems of equations that are solved at a time
KEEP = 1e-3  # how strongly a scale is held where it is, as a share of the mean diagonal


def refine(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    *,
    greatest: int,
    rounds: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return better codes, float32 [K, N], and scales, float32 [G, N], that float16 holds.

    Args:
        weight: what to come close to, float32 [K, N].
        hessian: the mean of x xᵀ over the layer's inputs, float32 [K, K].
        codes: GPTQ's, float32 [K, N].
        scales: GPTQ's, float32 [G, N].
        zeros: float32 [G, N]; they stay.
        groups: the group of each row, int64 [K].
        greatest: the greatest code.
        rounds: how often scales and codes take their turns.
    """
    held = zeros[groups]
    steps = codes - held
    for _ in range(rounds):
        steps = _descend(weight, hessian, steps, scales[groups], -held, greatest - held)
        scales = _fit_scales(weight, hessian, steps, scales, groups)
    return steps + held, scales


def _fit_scales(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
) -> torch.Tensor:
    """Solve for the scales of all groups of each column, codes fixed."""
    count, columns = scales.shape
    width = max(SYSTEM_BYTES // (16 * count * count), 1)
    pieces = zip(
        weight.split(width, dim=1),
        steps.split(width, dim=1),
        scales.split(width, dim=1),
        strict=True,
    )
    order = torch.argsort(groups, stable=True)
    hessian, sizes = hessian[order][:, order], torch.bincount(groups).tolist()
    fitted = [
        _fit_piece(hessian, weight[order], steps[order], scales, sizes)
        for weight, steps, scales in pieces
    ]
    return torch.cat(fitted, dim=1) if columns else scales


def _fit_piece(
    hessian: torch.Tensor,
    weight: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:
    """Solve for some columns; rows are sorted by their groups, which have these sizes."""
    count, columns = scales.shape
    system = torch.empty(count, count, columns)
    last = 0
    for group, size in enumerate(sizes):
        first, last = last, last + size
        # Only with the groups up to this one: the system is symmetric.
        spread = steps[:last] * (hessian[:last, first:last] @ steps[first:last])
        system[group, : group + 1] = _sums(spread, sizes[: group + 1])
        system[:group, group] = system[group, :group]
    right = _sums(steps * (hessian @ weight), sizes)
    matrix = system.permute(2, 0, 1).double()
    keep = KEEP * matrix.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-30
    matrix.diagonal(dim1=1, dim2=2).add_(keep[:, None])
    before = scales.t().double()
    solved = torch.linalg.solve_ex(matrix, right.t().double() + keep[:, None] * before).result
    fitted = solved.t().half().float()
    return torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, scales)


def _descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    lowest: torch.Tensor,
    highest: torch.Tensor,
) -> torch.Tensor:
    """Go through the rows once and move each to its best code: float32 [K, N]."""
    steps = steps.clone()
    slope = hessian @ (weight - steps * scales)
    diagonal = hessian.diagonal().tolist()
    for first in range(0, len(steps), BLOCK):
        last = min(first + BLOCK, len(steps))
        inside, changes = slope[first:last].clone(), torch.empty_like(slope[first:last])
        for row in range(first, last):
            scale, step, i = scales[row], steps[row], row - first
            best = torch.addcdiv(step, inside[i], scale, value=1 / diagonal[row]).round_()
            best = torch.minimum(torch.maximum(best, lowest[row]), highest[row])
            torch.mul(best - step, scale, out=changes[i])
            steps[row] = best
            inside[i + 1 :].addr_(hessian[row + 1 : last, row], changes[i], alpha=-1)
        slope[last:].addmm_(hessian[last:, first:last], changes, alpha=-1)
    return steps


def _sums(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Add up the rows of each group, which follow each other: float32 [G, N]."""
    if sizes[0] == sizes[-1]:
        return rows.view(len(sizes), sizes[0], -1).sum(dim=1)
    return torch.stack([part.sum(dim=0) for part in rows.split(sizes)])
