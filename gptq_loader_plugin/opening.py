"""Find a checkpoint, open it, and plan its load on the devices it is to run on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.checkpoint.architectures.translate import translate
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.events import LoadRequest
from gptq_loader_plugin.planning.placement import place
from gptq_loader_plugin.planning.plan import make_plan
from gptq_loader_plugin.reference import resolve

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Device
    from gptq_loader_plugin.planning.plan import Plan
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["Opened", "find_first_device", "open_planned", "plan_load"]

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Opened:
    """A load that was planned: when it began, what was asked, the checkpoint, and the plan."""

    began: float
    request: LoadRequest
    checkpoint: Checkpoint
    plan: Plan


def find_first_device(
    device: str | None,
    device_map: str | Mapping[str, str] | None,
    max_memory: Mapping[str, str | int] | None,
) -> Device:
    """Find the one device, or the first of several: where a model's beginning and end are."""
    if device_map is None:
        if max_memory:
            raise OptionInvalid(
                "memory limits are for a model over several devices",
                hint='ask for that: device_map="auto", or --device-map auto',
            )
        return find_device(device)
    if device is not None:
        raise OptionInvalid(
            "a device and a device map were asked for",
            hint="name one of them; a device map names its own devices",
        )
    first = next(iter(max_memory or {}), None)
    if not isinstance(device_map, str):
        first = device_map.get("", next(iter(device_map.values()), None))
    return find_device("cpu" if first == "disk" else first)


def _check_present(device: Device) -> None:
    if not device.present:
        raise OptionInvalid(
            f"{device} is not on this machine", hint="load on one that is; explain takes any"
        )


def open_planned(
    reference: str | Path,
    plugins: Plugins,
    *,
    named: str | None = None,
    device: str | None,
    backend: str | None,
    dtype: str | torch.dtype | None,
    revision: str | None = None,
    device_map: str | Mapping[str, str] | None,
    max_memory: Mapping[str, str | int] | None,
    offload_folder: str | Path | None,
    int8_cache: bool = False,
) -> Opened:
    """Find a checkpoint, open it and plan its load, on devices that are here."""
    began = time.monotonic()
    where = find_first_device(device, device_map, max_memory)
    _check_present(where)
    dtype_name = None if dtype is None else _dtype_name(dtype)
    path = resolve(reference, plugins=plugins, revision=revision)
    request = LoadRequest(named or str(reference), path, str(where), backend)
    plugins.hook.gptq_before_load(request=request)
    checkpoint = translate(open_checkpoint(path, plugins.readers()))
    plan = plan_load(
        checkpoint,
        where,
        plugins,
        reference=request.reference,
        backend=backend,
        dtype=dtype_name,
        device_map=device_map,
        max_memory=max_memory,
        int8_cache=int8_cache,
    )
    for placed in plan.placed.values():
        _check_present(placed.device)
    if offload_folder is None and any(it.on_disk for it in plan.placed.values()):
        raise OptionInvalid(
            "a part of the model is to stay on the disk, and no folder is named for it",
            hint="name one on a fast disk: offload_folder=FOLDER, or --offload-folder FOLDER",
        )
    return Opened(began, request, checkpoint, plan)


def plan_load(
    checkpoint: Checkpoint,
    where: Device,
    plugins: Plugins,
    *,
    reference: str,
    backend: str | None,
    dtype: str | None = None,
    device_map: str | Mapping[str, str] | None = None,
    max_memory: Mapping[str, str | int] | None = None,
    int8_cache: bool = False,
) -> Plan:
    """Plan the load of an open checkpoint, on one device or over several."""
    placed = None
    if device_map is not None:
        placed = place(
            checkpoint,
            plugins.kernels(),
            device_map=device_map,
            max_memory=max_memory,
            backend=backend,
        )
    return make_plan(
        checkpoint,
        where,
        plugins.kernels(),
        reference=reference,
        backend=backend,
        dtype=dtype,
        placed=placed,
        int8_cache=int8_cache,
    )


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise OptionInvalid(f"no model computes in {name}", hint=f"name one of {', '.join(DTYPES)}")
    return name
