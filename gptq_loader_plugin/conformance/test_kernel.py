"""A kernel's answers against float64, over a pairwise cover of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gptq_loader_plugin.conformance.check import SPIKE, Oracle, consider, measure, tolerance
from gptq_loader_plugin.conformance.cover import pairwise_cover
from gptq_loader_plugin.conformance.declined import DeclinedTable, accepts_nothing
from gptq_loader_plugin.conformance.grid import possible_layers
from gptq_loader_plugin.conformance.layers import make_layer, make_spec
from gptq_loader_plugin.verdict import Declined

if TYPE_CHECKING:
    from gptq_loader_plugin.conformance.grid import Cell
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel


def test_some_layer_is_accepted(
    kernel: Kernel, device: Device, request: pytest.FixtureRequest
) -> None:
    """Of a kernel that declines every cell, nothing is tested: it fails, unless --allow-none."""
    table = DeclinedTable()
    for cell in pairwise_cover(possible_layers()):
        verdict = consider(kernel, make_spec(cell.case), device)
        if not isinstance(verdict, Declined):
            return
        table.add(cell.layer, verdict.reason, 1)
    if request.config.getoption("--allow-none"):
        pytest.skip(f"{kernel.name}: {table.reasons()[0].words}")
    pytest.fail(accepts_nothing(kernel.name, table), pytrace=False)


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
