"""Hold a prepared layer's answers against float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import hypot
from typing import TYPE_CHECKING

import torch

from gptq_loader_plugin.conformance.grid import AXES
from gptq_loader_plugin.verdict import Declined

if TYPE_CHECKING:
    from gptq_loader_plugin.conformance.grid import Cell, View
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel, LayerSpec
    from gptq_loader_plugin.verdict import Verdict

__all__ = ["SPIKE", "TOLERANCE", "Oracle", "consider", "measure", "off_by", "tolerance"]

# A product's error is the root mean square of what it is off by, over that of the right answers
# (of its rows, or where they are small, of the layer), for x as it is given, rounded to its dtype
# already. How large it may be, by the dtype that a kernel says it computes in; docs/conformance.md
# has what was measured:
TOLERANCE = {
    "float32": 1e-6,  # sums of a thousand products: 4.2e-7 measured
    "float16": 2e-3,  # exllamav2 sums in float16 as well
    "bfloat16": 4.5e-3,  # x and the weight are each rounded, by 1.6e-3; of short rows, 3.9e-3
    "int8": 1.5e-2,  # activations of 8 bits: 8.6e-3 measured
}
# The answer is rounded once more, to the dtype of x: 3.1e-4 and 2.5e-3 measured of short rows.
ROUNDING = {"float32": 0.0, "float16": 3.5e-4, "bfloat16": 2.8e-3}
SPIKE = 6  # times that is what a single value may be off by
MAX_REASON = 100  # of a reason, so that it fits a line


@dataclass(frozen=True, slots=True)
class Oracle:
    """The right answers of one layer.

    Attributes:
        x: the most rows of x, float64 [M, K], before they are rounded to a dtype.
        answers: the product of x as it is rounded, by its dtype: float64 [M, N].
    """

    x: torch.Tensor
    answers: dict[str, torch.Tensor]

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Oracle:
        """Multiply by the weight, float64 [N, K], in float64."""
        x = _rows_of_x(weight.shape[1])
        add = 0.0 if bias is None else bias.double()
        answers = {
            dtype: x.to(getattr(torch, dtype)).double() @ weight.T + add for dtype in AXES["dtype"]
        }
        return cls(x, answers)


def consider(kernel: Kernel, spec: LayerSpec, device: Device) -> Verdict:
    """Ask a kernel, and hold its answer to what every answer must be.

    Raises:
        AssertionError: it is not what an answer must be.
    """
    verdict = kernel.consider(spec, device)
    if verdict.kernel != kernel.name:
        raise AssertionError(f"the kernel {kernel.name!r} answers as {verdict.kernel!r}")
    if isinstance(verdict, Declined):
        reason = verdict.reason
        if reason != reason.strip() or not 0 < len(reason) <= MAX_REASON or "\n" in reason:
            raise AssertionError(f"no reason of one line, {MAX_REASON} letters at most: {reason!r}")
    elif verdict.dtype not in TOLERANCE or verdict.prepared_bytes <= 0:
        raise AssertionError(f"no dtype, or no bytes, that can be: {verdict}")
    return verdict


def measure(
    module: torch.nn.Module, cell: Cell, oracle: Oracle, device: str
) -> tuple[float, float]:
    """Multiply as a cell says: (the error, that of the value that is furthest off).

    Raises:
        AssertionError: the answer's shape or dtype is wrong.
    """
    dtype: torch.dtype = getattr(torch, cell.dtype)
    x = _as_view(oracle.x[: cell.rows].to(dtype).to(device), cell.view)
    right = oracle.answers[cell.dtype][: cell.rows]
    with torch.inference_mode():
        y = module(x)
    if y.dtype != x.dtype:
        raise AssertionError(f"x is {x.dtype} and the answer {y.dtype}")
    if y.shape != (*x.shape[:-1], right.shape[1]):
        raise AssertionError(f"x is {tuple(x.shape)} and the answer {tuple(y.shape)}")
    return off_by(y.reshape(right.shape), right, oracle.answers[cell.dtype])


def off_by(y: torch.Tensor, right: torch.Tensor, all_right: torch.Tensor) -> tuple[float, float]:
    """Compare answers, [M, N], with the right ones: (the error, that of the value furthest off)."""
    if not right.numel():
        return 0.0, 0.0
    off = y.cpu().double() - right
    scale = max(_size(right), _size(all_right))
    return _size(off) / scale, float((off.abs() / right.abs().clamp(min=scale)).max())


def tolerance(computes_in: str, dtype: str) -> float:
    """Return how far off an answer of a dtype may be, of a kernel that computes in another.

    A kernel of 16 bits may compute in x's own.
    """
    exact = computes_in == "float32"
    tolerance = TOLERANCE[computes_in] if exact else max(TOLERANCE[computes_in], TOLERANCE[dtype])
    return hypot(tolerance, ROUNDING[dtype])


def _size(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@cache
def _rows_of_x(features: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(features)
    return torch.randn(max(AXES["rows"]), features, generator=random, dtype=torch.float64)


def _as_view(x: torch.Tensor, view: View) -> torch.Tensor:
    """Return x, [M, K], as a model would: whole, as a view of something else, or with a batch."""
    match view:
        case "plain":
            return x
        case "transposed":
            return x.t().contiguous().t()
        case "strided":
            return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1).flatten(1)[:, ::2]
        case "batched":
            return x[:, None]
