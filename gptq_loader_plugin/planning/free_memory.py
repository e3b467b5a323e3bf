"""How much of a device's memory is free, asked without importing torch or starting the device."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.system.memory import free_memory

if TYPE_CHECKING:
    from gptq_loader_plugin.device import Device

__all__ = ["free_bytes"]

METAL = 0.7  # of the machine's memory that Metal recommends a process to take at most
BUS_ID_LENGTH = 32


def free_bytes(device: Device) -> int | None:
    """Return the bytes that are free on a device, or None where that cannot be known."""
    if not device.present or device.type == "xpu":
        return None
    if device.type == "cpu":
        return free_memory()
    if device.type == "mps":
        return min(free_memory(), int((device.memory_bytes or 0) * METAL))
    free = _free_cuda(device.index) if device.type == "cuda" else free_rocm(device.index)
    return free if free is None else min(free, device.memory_bytes or free)


class _Memory(ctypes.Structure):
    """`nvmlMemory_t`."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def _free_cuda(index: int) -> int | None:
    """Ask NVML, which needs no context on the GPU; by bus, since it counts hidden GPUs too.

    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
    """
    windows = os.name == "nt"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if windows else "libcuda.so.1")
        nvml = ctypes.CDLL("nvml.dll" if windows else "libnvidia-ml.so.1")
    except OSError:
        return None
    bus, handle, memory = ctypes.create_string_buffer(BUS_ID_LENGTH), ctypes.c_int(), _Memory()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), index):
        return None
    if driver.cuDeviceGetPCIBusId(bus, BUS_ID_LENGTH, handle) or nvml.nvmlInit_v2():
        return None
    gpu = ctypes.c_void_p()
    try:
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(gpu)):
            return None
        if nvml.nvmlDeviceGetMemoryInfo(gpu, ctypes.byref(memory)):
            return None
    finally:
        nvml.nvmlShutdown()
    return int(memory.free)


def free_rocm(
    index: int,
    nodes: Path = Path("/sys/class/kfd/kfd/topology/nodes"),
    renderers: Path = Path("/sys/class/drm"),
) -> int | None:
    """Read what the amdgpu driver says of a GPU's memory.

    Args:
        index: which of the nodes that are GPUs.
        nodes: the kernel's topology; a node with a gfx version is a GPU.
        renderers: the kernel's list of them, by the number that a node names.
    """
    gpus = []
    try:
        for properties in sorted(nodes.glob("*/properties"), key=lambda it: int(it.parent.name)):
            fields = dict(line.split(maxsplit=1) for line in properties.read_text().splitlines())
            if int(fields.get("gfx_target_version", "0")):
                gpus.append(fields)
        folder = renderers / f"renderD{int(gpus[index]['drm_render_minor'])}" / "device"
        total = int((folder / "mem_info_vram_total").read_text())
        return total - int((folder / "mem_info_vram_used").read_text())
    except (OSError, ValueError, LookupError):
        return None
