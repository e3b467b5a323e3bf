"""Which device each part of a model is on, where there is more than one."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.device import find_device, find_devices
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.planning.choose import choose
from gptq_loader_plugin.planning.dequantized import dequantized_bytes, is_dequantized
from gptq_loader_plugin.system.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Device, Kernel

__all__ = ["LEFT_FREE", "Place", "place", "place_of", "read_limits"]

DISK = "disk"
BLOCK = re.compile(r"(.*?\.\d+)\.")
LEFT_FREE = 0.9  # of a device's memory is filled where no limit is given: replies need room too


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a model is.

    Attributes:
        name: what the user calls it: "cuda:0", "cpu", "disk".
        device: what computes there; for the disk, the CPU.
    """

    name: str
    device: Device

    @property
    def on_disk(self) -> bool:
        """Whether its weights are mapped from a file, read as they are needed."""
        return self.name == DISK


def place(
    checkpoint: Checkpoint,
    kernels: Sequence[Kernel],
    *,
    device_map: str | Mapping[str, str],
    max_memory: Mapping[str, str | int] | None = None,
    backend: str | None = None,
) -> dict[str, Place]:
    """Return every part of the model a place.

    Args:
        checkpoint: its layers and other tensors.
        kernels: the kernels to ask; what a block takes depends on the one that a device gets.
        device_map: "auto" fills the devices in the order of `max_memory`, whole blocks at a time;
            or the places of parts by the beginnings of their names, "" for all others.
        max_memory: the most bytes of weights in each place, "8GB" or a number; the disk has no
            limit. None takes most of the memory of every device here, the best first.
        backend: use this kernel for every layer.

    Returns:
        The places, by the beginning of a tensor's name; the longest that fits counts.

    Raises:
        OptionInvalid: a part has no place, or not all of them fit.
    """
    if not isinstance(device_map, str):
        placed = {name: _named(place_name) for name, place_name in device_map.items()}
        for name in checkpoint.headers:
            if place_of(placed, name) is None:
                raise OptionInvalid(
                    f"the device map has no place for {name}",
                    hint='give the rest of the model a place too: {"": "cpu"}',
                )
        return placed
    if device_map != "auto":
        raise OptionInvalid(
            f"no device map is called {device_map!r}",
            hint='write "auto", or a place for each part: {"": "cpu", "model.layers.0": "disk"}',
        )
    return _fill(checkpoint, kernels, _limits(max_memory), backend)


def place_of(placed: Mapping[str, Place], name: str) -> Place | None:
    """Find the place of a tensor, a layer or a module by its name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (place := placed.get(".".join(parts[:end]))) is not None:
            return place
    return placed.get("")


def read_limits(text: str | None) -> dict[str, str] | None:
    """Read what `--max-memory` is given: cpu=10GB,cuda:0=8GB,disk."""
    if not text:
        return None
    pairs = (part.strip().partition("=") for part in text.split(","))
    return {name.strip(): size.strip() for name, _, size in pairs}


def _limits(max_memory: Mapping[str, str | int] | None) -> list[tuple[Place, int | None]]:
    """List the places with their limits, in order."""
    if max_memory:
        return [
            (_named(name), None if name == DISK and not str(size) else parse_size(size))
            for name, size in max_memory.items()
        ]
    places = []
    for device in find_devices():
        memory = device.memory_bytes
        limit = None if memory is None else int(memory * LEFT_FREE)
        places.append((Place(device.torch_name, device), limit))
    return places


def _fill(
    checkpoint: Checkpoint,
    kernels: Sequence[Kernel],
    limits: list[tuple[Place, int | None]],
    backend: str | None,
) -> dict[str, Place]:
    """Fill one place after another with whole blocks; what is in no block is in the first."""
    layers: dict[str, list[Any]] = defaultdict(list)
    for layer in checkpoint.layers.values():
        layers[_unit(layer.name)].append(layer)
    packed = {part for name in checkpoint.layers for part in checkpoint.layer_tensors(name)}
    others: dict[str, int] = defaultdict(int)
    for name, info in checkpoint.headers.items():
        others[_unit(name)] += 0 if name in packed else info.nbytes
    units = sorted(others, key=_natural)  # "" first
    placed: dict[str, Place] = {}
    which, used, scratch = 0, 0, 0
    for unit in units:
        while True:
            where, limit = limits[which]
            size, needed = others[unit], scratch
            for layer in layers[unit]:
                if is_dequantized(layer.name):
                    size += dequantized_bytes(layer, layer.half_dtype)
                    continue
                chosen = choose(layer, where.device, kernels, only=backend).chosen
                size += chosen.prepared_bytes
                needed = max(needed, chosen.scratch_bytes)
            if limit is None or used + size + needed <= limit:
                break
            which, used, scratch = which + 1, 0, 0
            if which == len(limits):
                raise OptionInvalid(
                    f"{len(placed)} of the model's {len(units)} parts fit the memory given",
                    hint="give more, or let the rest stay on the disk: --max-memory cpu=8GB,disk",
                )
        placed[unit] = where
        used, scratch = used + size, needed
    return placed


def _unit(name: str) -> str:
    match = BLOCK.match(name)
    return match[1] if match else ""


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in name.split(".")
        if part
    ]


def _named(name: str) -> Place:
    return Place(name, find_device("cpu" if name == DISK else name))
