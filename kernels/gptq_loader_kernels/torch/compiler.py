"""Whether torch can compile for a device, found without importing torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import Device

__all__ = ["COMPILE", "why_not_compiled"]

COMPILE = "GPTQ_LOADER_TORCH_COMPILE"
OLDEST = (7, 0)  # that Triton, which torch compiles by on CUDA, generates code for
C_COMPILERS = ("cc", "gcc", "clang")  # Triton compiles what launches a kernel


def why_not_compiled(device: Device) -> str | None:
    """Say why weights are not unpacked by compiled code on a device, or None where they are."""
    setting = os.environ.get(COMPILE)
    if setting == "0":
        return f"{COMPILE}=0"
    if device.type in ("cpu", "mps"):
        # On a CPU with a C++ compiler the kernel `cpu` was built; Metal's backend is a prototype.
        return (
            None if setting == "1" else f"on a {device.type} device torch compiles by {COMPILE}=1"
        )
    if device.capability is not None and device.capability < OLDEST:
        return f"torch compiles for sm{OLDEST[0]}{OLDEST[1]} or newer; this is {device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, which torch compiles by"
    if not os.environ.get("CC") and not any(map(shutil.which, C_COMPILERS)):
        return "there is no C compiler, which Triton needs"
    return None
