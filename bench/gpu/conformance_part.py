"""Hold every kernel that runs on the device against float64, over the suite's cover."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gptq_loader_plugin.conformance.cover import pairwise_cover
from gptq_loader_plugin.conformance.grid import possible_layers
from gptq_loader_plugin.conformance.layers import make_spec
from gptq_loader_plugin.conformance.run import Report, by_layer
from gptq_loader_plugin.conformance.spread import run_in_parts
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.verdict import Accepted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from record import Record
    from where import Where

__all__ = ["run"]

JOBS = 8  # processes, each with a context on the GPU
LAYERS = 10  # that a process takes at a time
TINY_LAYERS = 10  # of the cover: an interpreted kernel takes some 100 ms for each
SHOWN = 5  # failed cells that a check names


def run(record: Record, where: Where) -> None:
    """Run the cover, spread over processes: most of the time goes into compiling kernels."""
    layers = list(possible_layers())
    work = by_layer(pairwise_cover(layers), layers)
    kernels = Plugins(installed=True).kernels()
    specs = [make_spec(layer.case) for layer, _ in work]
    names = tuple(
        kernel.name
        for kernel in kernels
        if any(isinstance(kernel.consider(spec, where.device), Accepted) for spec in specs)
    )
    if where.tiny:
        work = work[:: len(work) // TINY_LAYERS]
    jobs = 1 if where.tiny else max(1, min(JOBS, (os.cpu_count() or 2) // 2))
    reports = {name: Report(name) for name in names}
    parts = run_in_parts(names, where.device, work, jobs=jobs, layers=LAYERS)
    for done, part in parts:
        for report in part:
            reports[report.kernel].update(report)
        record.restart()
        _note(record, reports.values())
        record.figure("cover", layers=len(work), done=done)
        if done < len(work):
            why = f"{len(work) - done} of {len(work)} layers were not reached"
            record.check("the whole cover", passed=None, detail=why)
        if record.left < 0:
            return  # whoever started this process ends those that it has started


def _note(record: Record, reports: Iterable[Report]) -> None:
    """Note what has come of each kernel up to now."""
    for report in reports:
        failed = "; ".join(f"{cell}: {why}" for cell, why in report.failed[:SHOWN])
        record.check(
            f"{report.kernel}: {report.passed} cells right, {report.declined.cells} declined, "
            f"{len(report.failed)} wrong",
            passed=not report.failed,
            detail=failed,
        )
        for key, worst in sorted(report.worst.items()):
            record.figure(
                report.kernel,
                computes=key,
                error=worst.error,
                allowed=worst.allowed,
                cell=worst.cell,
            )
