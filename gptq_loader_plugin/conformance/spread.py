"""Spread the cells of a run over processes, a second's work at a time."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

from gptq_loader_plugin.conformance.run import Report, run
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptq_loader_plugin.conformance.run import Work
    from gptq_loader_plugin.device import Device

__all__ = ["run_in_parts"]

LAYERS = 40  # of a part, unless the caller says

Task = tuple[tuple[str, ...], "Device", "Sequence[Work]"]


def run_in_parts(
    names: tuple[str, ...],
    device: Device,
    work: Sequence[Work],
    *,
    jobs: int,
    layers: int = LAYERS,
) -> Iterator[tuple[int, list[Report]]]:
    """Run kernels over the work, in this process or in several.

    Args:
        names: the kernels' names; plugins are not handed to other processes.
        device: where they run.
        work: layers, and their cells.
        jobs: how many processes.
        layers: how many of a part, which one process runs.

    Yields:
        How many layers are done, and the reports of the last part.
    """
    parts = [work[start : start + layers] for start in range(0, len(work), layers)]
    tasks: list[Task] = [(names, device, part) for part in parts]
    done = 0
    for task, reports in zip(tasks, _answers(tasks, jobs), strict=True):
        done += len(task[2])
        yield done, reports


def _answers(tasks: list[Task], jobs: int) -> Iterator[list[Report]]:
    if jobs == 1:
        yield from map(_answer, tasks)
        return
    fresh = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=fresh, initializer=_use_one_thread) as processes:
        yield from processes.map(_answer, tasks)


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _answer(task: Task) -> list[Report]:
    names, device, work = task
    kernels = {kernel.name: kernel for kernel in Plugins(installed=True).kernels()}
    return run([kernels[name] for name in names], device, work)
