"""How much memory is free on a device that torch computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.system.memory import free_memory

if TYPE_CHECKING:
    import torch

__all__ = ["free_device_memory"]


def free_device_memory(device: torch.device) -> int:
    """Count the free bytes of a device's memory: of the system's, where they are the same."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds and does not use is free too
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "xpu":
        torch.xpu.empty_cache()
        return int(torch.xpu.mem_get_info(device)[0])
    if device.type == "mps":
        allowed = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(allowed, free_memory())
    return free_memory()
