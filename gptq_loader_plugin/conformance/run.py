"""Run kernels over cells of the grid, each layer made and prepared once, and report."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.conformance.check import SPIKE, Oracle, consider, measure, tolerance
from gptq_loader_plugin.conformance.declined import DeclinedTable
from gptq_loader_plugin.conformance.grid import cells_of
from gptq_loader_plugin.conformance.layers import make_layer
from gptq_loader_plugin.verdict import Declined

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from gptq_loader_plugin.conformance.grid import Cell
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel

__all__ = ["Report", "Work", "by_layer", "run"]

Work = tuple["Cell", "tuple[Cell, ...]"]  # a layer, and its cells
SHOWN = 20  # failed cells that a report's text names


@dataclass(frozen=True, slots=True)
class Worst:
    """The cell that is furthest off, of those with one dtype of x.

    Attributes:
        error: how far.
        allowed: how far it may be.
        cell: which.
    """

    error: float = 0.0
    allowed: float = 0.0
    cell: str = ""


@dataclass(slots=True)
class Report:
    """What came of one kernel's cells.

    Attributes:
        kernel: its name.
        passed: how many cells were right.
        failed: each cell that was neither right nor declined, and why.
        declined: those declined.
        worst: the furthest off, by the dtype computed in and the dtype of x.
    """

    kernel: str
    passed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    declined: DeclinedTable = field(default_factory=DeclinedTable)
    worst: dict[str, Worst] = field(default_factory=dict)

    @property
    def cells(self) -> int:
        """How many cells there were."""
        return self.passed + len(self.failed) + self.declined.cells

    @property
    def declined_all(self) -> bool:
        """Whether there were cells and the kernel accepted none."""
        return self.cells == self.declined.cells > 0

    def update(self, other: Report) -> None:
        """Add the report of other cells."""
        self.passed += other.passed
        self.failed += other.failed
        self.declined.update(other.declined)
        for key, worst in other.worst.items():
            self.worst[key] = max(
                self.worst.get(key, worst), worst, key=lambda worst_case: worst_case.error
            )

    def text(self) -> str:
        """Write it out for people."""
        counts = (
            f"{self.passed:,} passed, {self.declined.cells:,} declined, {len(self.failed):,} failed"
        )
        lines = [f"{self.kernel}: {self.cells:,} cells: {counts}\n"]
        for key, worst in sorted(self.worst.items()):
            lines.append(
                f"  {key}: off by {worst.error:.1e} of {worst.allowed:.1e} at most: {worst.cell}\n"
            )
        lines += [f"  FAILED {cell}: {why}\n" for cell, why in self.failed[:SHOWN]]
        return "".join(lines) + self.declined.text()

    def json(self) -> dict[str, Any]:
        """Write it out for programs."""
        return {
            "kernel": self.kernel,
            "cells": self.cells,
            "passed": self.passed,
            "declined": [asdict(reason) for reason in self.declined.reasons()],
            "failed": [{"cell": cell, "why": why} for cell, why in self.failed],
            "worst": {key: asdict(worst) for key, worst in sorted(self.worst.items())},
        }


def by_layer(cells: Iterable[Cell] | None, layers: Iterable[Cell]) -> list[Work]:
    """Bring together the cells of each layer: those given, or all that the layers have."""
    if cells is None:
        return [(layer, tuple(cells_of(layer))) for layer in layers]
    together: defaultdict[Cell, list[Cell]] = defaultdict(list)
    for cell in cells:
        together[cell.layer].append(cell)
    return [(layer, tuple(several)) for layer, several in together.items()]


def run(kernels: Sequence[Kernel], device: Device, work: Iterable[Work]) -> list[Report]:
    """Hold every kernel's answers to every cell, and report on each kernel.

    Args:
        kernels: the kernels.
        device: where they run.
        work: layers, and their cells.
    """
    reports = [Report(kernel.name) for kernel in kernels]
    for layer, cells in work:
        spec, packed, weight = make_layer(layer.case)
        oracle = Oracle.of(weight, packed.bias)
        for kernel, report in zip(kernels, reports, strict=True):
            try:
                verdict = consider(kernel, spec, device)
                if isinstance(verdict, Declined):
                    report.declined.add(layer, verdict.reason, len(cells))
                    continue
                module = kernel.prepare(spec, packed, device)
            except Exception as error:  # noqa: BLE001 - a plugin may raise anything; it has failed
                report.failed += [(str(cell), _why(error)) for cell in cells]
                continue
            for cell in cells:
                _hold(module, cell, oracle, device, verdict.exactness, report)
    return reports


def _hold(
    module: torch.nn.Module,
    cell: Cell,
    oracle: Oracle,
    device: Device,
    computes_in: str,
    report: Report,
) -> None:
    try:
        error, spike = measure(module, cell, oracle, device.torch_name)
    except Exception as raised:  # noqa: BLE001 - a plugin may raise anything; it has failed
        report.failed.append((str(cell), _why(raised)))
        return
    allowed = tolerance(computes_in, cell.dtype)
    if not (error <= allowed and spike <= SPIKE * allowed):
        report.failed.append((str(cell), f"off by {error:.1e}, one value by {spike:.1e}"))
        return
    report.passed += 1
    key = f"{computes_in}, x {cell.dtype}"
    worst = report.worst.get(key, Worst())
    if error > worst.error:
        report.worst[key] = Worst(error, allowed, str(cell))


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
