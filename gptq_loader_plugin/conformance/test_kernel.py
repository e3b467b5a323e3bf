"""A kernel's answers against float64, over a pairwise cover of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gptq_loader_plugin.conformance.check import SPIKE, Oracle, consider, measure, tolerance
from gptq_loader_plugin.conformance.layers import make_layer
from gptq_loader_plugin.verdict import Declined

if TYPE_CHECKING:
    from gptq_loader_plugin.conformance.grid import Cell
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel


def test_product_is_right_or_declined(kernel: Kernel, device: Device, cell: Cell) -> None:
    """Every cell is accepted and right, or declined with a reason."""
    spec, packed, weight = make_layer(cell.case)
    verdict = consider(kernel, spec, device)
    if isinstance(verdict, Declined):
        pytest.skip(f"{kernel.name}: {verdict.reason}")
    module = kernel.prepare(spec, packed, device)
    oracle = Oracle.of(weight, packed.bias)
    error, spike = measure(module, cell, oracle, device.torch_name)
    allowed = tolerance(verdict.exactness, cell.dtype)
    assert error <= allowed, f"off by {error:.1e}"
    assert spike <= SPIKE * allowed, f"one value is off by {spike:.1e}"
