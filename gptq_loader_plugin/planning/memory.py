"""Refuse a model that would not fit into memory, before the system ends the process for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import NotEnoughMemory
from gptq_loader_plugin.system.memory import free_memory
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["check_memory"]

OVERHEAD = 1.1  # of the weights: a load's own buffers, and a prompt's activations


def check_memory(name: str, plan: Plan, *, replaced: Plan | None = None) -> None:
    """Refuse a model for the CPU that needs more memory than is free.

    Args:
        name: what the user calls the model.
        plan: its load.
        replaced: the plan of the model that is unloaded first, whose memory is free by then.

    Raises:
        NotEnoughMemory: it does not fit.
    """
    if plan.device.type != "cpu":
        return
    free = free_memory()
    if replaced is not None and replaced.device.type == "cpu":
        free += replaced.weight_bytes
    needed = int(plan.memory_bytes * OVERHEAD)
    if needed > free:
        raise NotEnoughMemory(
            f"{name} needs {write_size(needed)} of memory, and {write_size(free)} is free",
            needed=needed,
            free=free,
            hint="choose a smaller one: fewer bits, or a smaller model",
        )
