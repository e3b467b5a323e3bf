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
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Device
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.planning.plan import Plan
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["Opened", "first_device", "open_planned", "plan_load"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A load that was planned: when it began, what was asked, the checkpoint, and the plan."""

    began: float
    request: LoadRequest
    checkpoint: Checkpoint
    plan: Plan


def first_device(options: LoadOptions) -> Device:
    """Find the one device, or the first of several: where a model's beginning and end are."""
    if options.device_map is None:
        return find_device(options.device)
    first = next(iter(options.max_memory or {}), None)
    if not isinstance(options.device_map, str):
        places = options.device_map
        first = places.get("", next(iter(places.values()), None))
    return find_device("cpu" if first == "disk" else first)


def open_planned(
    reference: str | Path, options: LoadOptions, plugins: Plugins, *, named: str | None = None
) -> Opened:
    """Find a checkpoint, open it and plan its load, on devices that are here.

    Args:
        reference: what to load.
        options: how.
        plugins: the plugins in force.
        named: what the user typed, where that is not `reference`.
    """
    began = time.monotonic()
    device = first_device(options)
    _check_present(device)
    path = resolve(reference, plugins=plugins, revision=options.revision)
    request = LoadRequest(named or str(reference), path, str(device), options.backend)
    plugins.hook.gptq_before_load(request=request)
    checkpoint = translate(open_checkpoint(path, plugins.readers()))
    plan = plan_load(checkpoint, options, plugins, reference=request.reference)
    for part in plan.placed.values():
        _check_present(part.device)
    if options.offload_folder is None and any(part.on_disk for part in plan.placed.values()):
        raise OptionInvalid(
            "a part of the model is to stay on the disk, and no folder is named for it",
            hint="name one on a fast disk: offload_folder=FOLDER, or --offload-folder FOLDER",
        )
    return Opened(began, request, checkpoint, plan)


def plan_load(
    checkpoint: Checkpoint, options: LoadOptions, plugins: Plugins, *, reference: str
) -> Plan:
    """Plan the load of an open checkpoint, on one device or over several."""
    placed = None
    if options.device_map is not None:
        placed = place(
            checkpoint,
            plugins.kernels(),
            device_map=options.device_map,
            max_memory=options.limits,
            backend=options.backend,
        )
    return make_plan(
        checkpoint,
        first_device(options),
        plugins.kernels(),
        reference=reference,
        backend=options.backend,
        dtype=options.dtype_name,
        placed=placed,
        int8_cache=options.kv_cache == "int8",
    )


def _check_present(device: Device) -> None:
    if not device.present:
        raise OptionInvalid(
            f"{device} is not on this machine", hint="load on one that is; explain takes any"
        )
