"""What this machine can compute on, found without importing torch.

CUDA is asked through libcuda with ctypes, ROCm through /sys/class/kfd, Intel's GPUs through
/sys/class/drm where torch was built for them, the CPU through /proc/cpuinfo or Windows' kernel. A
device that is not here can be named too, for `explain`: `cuda:sm86`, `rocm:gfx1100`, or `rocm`,
`mps` and `xpu` for any.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.system.memory import total_memory

__all__ = ["Device", "DeviceType", "find_device", "find_devices"]

DeviceType = Literal["cpu", "cuda", "rocm", "mps", "xpu"]

NAMED = re.compile(r"(?P<type>cpu|cuda|rocm|mps|xpu)(?::(?P<which>\w+))?")
ABSENT = {"cuda": "cuda:sm86", "rocm": "rocm:gfx1100"}
ROCM_ARCH = "gfx1100"  # of a ROCm device that is not here and not named: kernels treat all alike
# What people call a device that is not here; a name they do not know gets none.
CUDA_CARDS = {
    (6, 0): "P100",
    (6, 1): "GTX 10 series, P40",
    (7, 0): "V100",
    (7, 5): "RTX 20 series, T4",
    (8, 0): "A100",
    (8, 6): "RTX 30 series, A10",
    (8, 9): "RTX 40 series, L4, L40",
    (9, 0): "H100, H200",
    (10, 0): "B200",
    (12, 0): "RTX 50 series",
}
# https://developer.nvidia.com/cuda-gpus, from Maxwell on.
CAPABILITIES = (
    *((5, 0), (5, 2), (5, 3), (6, 0), (6, 1), (6, 2), (7, 0), (7, 2), (7, 5)),
    *((8, 0), (8, 6), (8, 7), (8, 8), (8, 9), (9, 0)),
    *((10, 0), (10, 1), (10, 3), (11, 0), (12, 0), (12, 1)),
)
ROCM_CARDS = {"gfx90a": "MI210, MI250", "gfx942": "MI300", "gfx1100": "RX 7900"}
UNNUMBERED: dict[DeviceType, str] = {"mps": "Apple GPU", "xpu": "Intel GPU"}
INTEL = "0x8086"  # its number among the vendors of PCI devices
CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
CPU_FLAGS_ARM = ("asimd", "asimddp", "i8mm", "bf16", "sve")
# By IsProcessorFeaturePresent's numbers (PF_...), which knows no more.
WINDOWS_FLAGS = {40: "avx2", 41: "avx512f", 43: "asimddp"}


@dataclass(frozen=True, slots=True)
class Device:
    """A device a layer may run on.

    Attributes:
        type: what it is; "rocm" is what torch calls cuda on AMD hardware.
        index: which of its type.
        name: what its maker calls it.
        capability: CUDA's compute capability, such as (8, 6).
        arch: ROCm's architecture, such as "gfx1100".
        memory_bytes: all of its memory, where known.
        features: the CPU's instruction sets that kernels ask about.
        present: whether it is on this machine; False for a device only named to `explain`.
        assume_built: whether kernels that must be compiled count as compiled; None means look.
    """

    type: DeviceType
    index: int = 0
    name: str = ""
    capability: tuple[int, int] | None = None
    arch: str = ""
    memory_bytes: int | None = None
    features: frozenset[str] = frozenset()
    present: bool = True
    assume_built: bool | None = None

    def __str__(self) -> str:
        """Name the device as messages do: "cuda sm86", "rocm gfx1100", "cpu (avx512_bf16)"."""
        if self.capability is not None:
            return f"{self.type} sm{self.capability[0]}{self.capability[1]}"
        if self.arch:
            return f"{self.type} {self.arch}"
        return self.type

    @property
    def torch_name(self) -> str:
        """The name torch gives it: "cuda:0", "cpu"."""
        if self.type in ("cuda", "rocm"):
            return f"cuda:{self.index}"
        return self.type if self.type == "cpu" or not self.index else f"{self.type}:{self.index}"


def find_devices() -> tuple[Device, ...]:
    """Find every device of this machine, the best first; the CPU is always the last."""
    return (*_cuda(), *_rocm(), *_xpu(), *_mps(), _cpu())


def find_device(name: str | None = None) -> Device:
    """Find the device a user names, or the best one here.

    Args:
        name: "cpu", "cuda", "cuda:1", "rocm", "mps", "xpu"; or one that need not be here,
            "cuda:sm86", "rocm:gfx1100" (and "rocm", "mps", "xpu"); or None for the best of this
            machine.

    Raises:
        OptionInvalid: the name is of no kind known, or names a device that is not here.
    """
    devices = find_devices()
    if name is None:
        return devices[0]
    match = NAMED.fullmatch(name.strip().lower())
    if match is None:
        raise OptionInvalid(
            f"no device is called {name!r}",
            hint="name one of cpu, cuda, cuda:1, rocm, mps, xpu; or, for explain, cuda:sm86",
        )
    kind, which = match["type"], match["which"]
    if which and (absent := _absent(kind, which)) is not None:
        return absent
    index = int(which) if which and which.isdigit() else 0
    for device in devices:
        same = device.type == kind or (device.type == "rocm" and kind == "cuda")
        if same and device.index == index:
            return device
    if kind == "rocm" and not which:
        return _absent_rocm(ROCM_ARCH)
    for unnumbered, maker in UNNUMBERED.items():
        if kind == unnumbered and not which:
            return Device(unnumbered, name=maker, present=False)
    here = ", ".join(
        f"{device_.type}:{device_.index}" if device_.type != "cpu" else "cpu" for device_ in devices
    )
    raise OptionInvalid(
        f"there is no {name} on this machine; there is {here}",
        hint=f"name one that is here, or ask explain about one that is not: {ABSENT[kind]}"
        if kind in ABSENT
        else "name one that is here",
    )


def _absent(kind: str, which: str) -> Device | None:
    if kind == "cuda" and (match := re.fullmatch(r"sm_?(\d+)(\d)a?", which)):
        capability = (int(match[1]), int(match[2]))
        if capability not in CAPABILITIES:
            known = ", ".join(f"sm{major}{minor}" for major, minor in CAPABILITIES)
            raise OptionInvalid(
                f"no GPU has the compute capability {match[1]}.{match[2]}",
                hint=f"name one of {known}",
            )
        name = CUDA_CARDS.get(capability, "")
        return Device("cuda", name=name, capability=capability, present=False)
    if kind == "rocm" and which.startswith("gfx"):
        return _absent_rocm(which)
    if which.isdigit():
        return None
    raise OptionInvalid(
        f"{which!r} is no {kind} device",
        hint="write a number (cuda:1), a compute capability (cuda:sm86) or an AMD architecture "
        "(rocm:gfx1100)",
    )


def _absent_rocm(arch: str) -> Device:
    return Device("rocm", name=ROCM_CARDS.get(arch, ""), arch=arch, present=False)


def _cpu() -> Device:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            match key.strip():
                case "flags" | "Features":
                    flags.update(value.split())
                case "model name":
                    name = value.strip()
                case _:
                    continue
    if sys.platform == "win32":
        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        flags.update(flag for number, flag in WINDOWS_FLAGS.items() if present(number))
    if sys.platform == "darwin" and platform.machine() == "arm64":
        flags.update(("asimd", "asimddp"))  # every one of them
    known = frozenset(flags & {*CPU_FLAGS, *CPU_FLAGS_ARM})
    return Device("cpu", name=name, memory_bytes=total_memory(), features=known)


def _cuda() -> tuple[Device, ...]:
    """Ask the CUDA driver; https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html."""
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    library = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    devices = []
    for index in range(count.value):
        handle, first, second = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(128)
        driver.cuDeviceGet(ctypes.byref(handle), index)
        driver.cuDeviceGetAttribute(ctypes.byref(first), major, handle)
        driver.cuDeviceGetAttribute(ctypes.byref(second), minor, handle)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
        driver.cuDeviceGetName(name, len(name), handle)
        devices.append(
            Device(
                "cuda",
                index=index,
                name=name.value.decode(errors="replace"),
                capability=(first.value, second.value),
                memory_bytes=memory.value,
            )
        )
    return tuple(devices)


def _rocm(nodes: Path = Path("/sys/class/kfd/kfd/topology/nodes")) -> tuple[Device, ...]:
    """Read the kernel's topology of AMD GPUs: a node with a gfx version is a GPU."""
    devices: list[Device] = []
    for properties in sorted(nodes.glob("*/properties"), key=lambda path: int(path.parent.name)):
        fields = dict(line.split(maxsplit=1) for line in properties.read_text().splitlines())
        version = int(fields.get("gfx_target_version", "0"))
        if not version:
            continue
        arch = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        banks = [
            int(line.split()[1])
            for bank in properties.parent.glob("mem_banks/*/properties")
            for line in bank.read_text().splitlines()
            if line.startswith("size_in_bytes")
        ]
        devices.append(
            Device("rocm", index=len(devices), arch=arch, memory_bytes=sum(banks) or None)
        )
    return tuple(devices)


def _xpu(
    renderers: Path = Path("/sys/class/drm"), *, built: bool | None = None
) -> tuple[Device, ...]:
    """List the Intel GPUs that Linux knows, where torch was built for them.

    Args:
        renderers: the kernel's list of GPUs.
        built: whether torch was built for them; None looks for its library.
    """
    if built is None:
        torch = importlib.util.find_spec("torch")
        folder = Path((torch and torch.origin) or "").parent / "lib"
        built = (folder / "libtorch_xpu.so").is_file()
    vendors = [
        file.read_text().strip()
        for file in sorted(renderers.glob("renderD*/device/vendor"), key=_renderer)
    ]
    count = vendors.count(INTEL) if built else 0
    return tuple(Device("xpu", index=index, name=UNNUMBERED["xpu"]) for index in range(count))


def _renderer(vendor: Path) -> int:
    return int(vendor.parts[-3].removeprefix("renderD"))


def _mps() -> tuple[Device, ...]:
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return ()
    return (replace(_cpu(), type="mps", features=frozenset()),)
