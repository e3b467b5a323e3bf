"""Plan a load: the kernel of every layer, with reasons, and the memory it takes.

Nothing here reads a weight, so a plan can be made for a device that is not on this machine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.planning.choose import choose, depends_on_memory
from gptq_loader_plugin.planning.dequantized import (
    dequantized_bytes,
    dequantized_note,
    is_dequantized,
)
from gptq_loader_plugin.planning.headroom import check_headroom
from gptq_loader_plugin.planning.model_shape import ModelShape, kv_bytes_per_token, shape_of
from gptq_loader_plugin.planning.placement import Place, place_of
from gptq_loader_plugin.planning.plan_text import describe_layers, layer_json
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.config import QuantConfig
    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec
    from gptq_loader_plugin.planning.choose import Choice

__all__ = ["Plan", "make_plan", "shared_scratch"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load will do.

    Attributes:
        reference: what the user typed.
        path: the checkpoint's folder or file.
        device: where it will run.
        config: how the checkpoint was quantised.
        choices: the choice for every quantised layer that a kernel runs.
        dtype: the dtype of everything that is not quantised, as torch names it.
        weight_bytes: what all the weights take in memory once loaded.
        checkpoint_bytes: what the weight files take on disk.
        kv_bytes_per_token: what a token of context takes, or None where config.json does not tell.
        warnings: what a user should know, one sentence each.
        not_built: for a device that is not here, the plan if no kernel that must be compiled is.
        placed: where there is more than one device, the places of the model's parts, by the
            beginnings of their names.
        place_bytes: what the weights take in each place.
        scratch_bytes: what products take besides, in memory that layers use in turn.
        shape: the model's sizes, as far as config.json tells.
        dequantized: the quantised layers that are dequantised as they are loaded: they belong to
            routers and embeddings, which no kernel runs.
    """

    reference: str
    path: Path
    device: Device
    config: QuantConfig
    choices: tuple[Choice, ...]
    dtype: str
    weight_bytes: int
    checkpoint_bytes: int
    kv_bytes_per_token: int | None
    warnings: tuple[str, ...] = ()
    not_built: Plan | None = None
    placed: Mapping[str, Place] = field(default_factory=dict)
    place_bytes: Mapping[str, int] = field(default_factory=dict)
    shape: ModelShape = field(default_factory=ModelShape)
    dequantized: tuple[LayerSpec, ...] = ()
    scratch_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """What the weights take, and what products by them do."""
        return self.weight_bytes + self.scratch_bytes

    def place(self, name: str) -> Place:
        """Find the place of a layer or a tensor by its name."""
        return place_of(self.placed, name) or Place(self.device.torch_name, self.device)

    def kernels(self) -> dict[str, int]:
        """Count the layers of each kernel, the most first."""
        counted = Counter(choice.chosen.kernel for choice in self.choices)
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))

    def headline(self) -> str:
        """Describe in one line which kernels run, how many layers each, and on what."""
        return f"{self._counted()} on {self.device}, computing in {self.dtype}"

    def explain(self) -> str:
        """Describe which kernel runs each kind of layer, why, and why not the others."""
        config = self.config
        group = "no groups" if config.group_size < 0 else f"groups of {config.group_size}"
        order = "act-order" if config.desc_act else "no act-order"
        symmetry = "symmetric" if config.sym else "asymmetric"
        name = f" ({self.device.name})" if self.device.name else ""
        absent = "" if self.device.present else ", which is not on this machine"
        context = (
            f"; {write_size(self.kv_bytes_per_token)} for each token of context"
            if self.kv_bytes_per_token
            else ""
        )
        memory, disk = write_size(self.weight_bytes), write_size(self.checkpoint_bytes)
        stored = f"format {config.checkpoint_format} (zeros {config.zeros})"
        lines = [
            f"{self.reference} on {self.device}{name}{absent}",
            f"  {config.bits}-bit, {group}, {order}, {symmetry}; {stored}",
            f"  weights {memory} in memory, {disk} on disk{context}",
            *self._scratch(),
            f"  kernels {self._counted()}, computing in {self.dtype}",
        ]
        lines += [
            f"  on {where}: {write_size(size)} of the weights"
            + (", read from there whenever they are needed" if where == "disk" else "")
            for where, size in self.place_bytes.items()
        ]
        lines += self._kinds()
        if self.dequantized:
            lines += ["", f"  {dequantized_note(self.dequantized)}"]
        other = self.not_built
        if other is not None and other.kernels() != self.kernels():
            lines += [
                "",
                "  where ExLlamaV2's extension is not built:",
                f"  weights {write_size(other.weight_bytes)} in memory",
                *other._scratch(),  # noqa: SLF001
                f"  kernels {other._counted()}, computing in {other.dtype}",  # noqa: SLF001
                *other._kinds(),  # noqa: SLF001
            ]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, for `explain --json`."""
        data: dict[str, Any] = {
            "reference": self.reference,
            "path": str(self.path),
            "device": str(self.device),
            "dtype": self.dtype,
            "layers": [
                {**layer_json(choice), "device": self.place(choice.layer.name).name}
                for choice in self.choices
            ],
            "kernels": self.kernels(),
            "dequantized": [layer.name for layer in self.dequantized],
            "weight_bytes": self.weight_bytes,
            "scratch_bytes": self.scratch_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "warnings": list(self.warnings),
        }
        if self.place_bytes:
            data["place_bytes"] = dict(self.place_bytes)
        if self.not_built is not None:
            data["not_built"] = self.not_built.to_json()
        return data

    def dequantizing(self, layers: Iterable[LayerSpec]) -> Plan:
        """Return the plan with these layers dequantised too: a load found them no linears."""
        names = {layer.name for layer in layers}
        moved = [choice for choice in self.choices if choice.layer.name in names]
        if not moved:
            return self
        grown = [
            (
                self.place(choice.layer.name).name,
                dequantized_bytes(choice.layer, self.dtype) - choice.chosen.prepared_bytes,
            )
            for choice in moved
        ]
        place_bytes = Counter(self.place_bytes)
        if self.place_bytes:
            for where, more in grown:
                place_bytes[where] += more
        return replace(
            self,
            choices=tuple(choice for choice in self.choices if choice.layer.name not in names),
            dequantized=(*self.dequantized, *(choice.layer for choice in moved)),
            weight_bytes=self.weight_bytes + sum(more for _, more in grown),
            place_bytes=dict(place_bytes),
        )

    def _counted(self) -> str:
        """Name the kernels, each with how many layers it runs."""
        total = len(self.choices)
        return ", ".join(
            f"{name} ({count} of {total} layers)"
            if count < total
            else f"{name} (all {total} layers)"
            for name, count in self.kernels().items()
        )

    def _scratch(self) -> list[str]:
        """Write a line for the memory that layers use in turn, where there is any."""
        if not self.scratch_bytes:
            return []
        return [f"  scratch {write_size(self.scratch_bytes)} more, which layers use in turn"]

    def _kinds(self) -> list[str]:
        """Write a paragraph for all layers with the same answers, and a line for every answer."""
        kinds: dict[tuple[str, tuple[tuple[str, str], ...]], list[LayerSpec]] = {}
        for choice in self.choices:
            where = f" on {self.place(choice.layer.name).name}" if self.placed else ""
            kinds.setdefault((where, choice.reasons()), []).append(choice.layer)
        lines: list[str] = []
        for (where, reasons), layers in kinds.items():
            answers: dict[str, list[str]] = {}
            for name, words in reasons:
                answers.setdefault(words, []).append(name)
            names = {words: ", ".join(same) for words, same in answers.items()}
            width = max(map(len, names.values()))
            lines += ["", f"  {describe_layers(layers, where)}"]
            lines += [f"    {same:<{width}}  {words}" for words, same in names.items()]
        return lines


def make_plan(
    checkpoint: Checkpoint,
    device: Device,
    kernels: Sequence[Kernel],
    *,
    reference: str,
    backend: str | None = None,
    dtype: str | None = None,
    placed: Mapping[str, Place] | None = None,
    int8_cache: bool = False,
) -> Plan:
    """Choose a kernel for every layer of `checkpoint` on `device`.

    Args:
        checkpoint: the open checkpoint.
        device: where it will run; one that is not here is planned for with and without the
            kernels that must be compiled.
        kernels: the kernels to ask.
        reference: what the user typed.
        backend: use this kernel for every layer, or fail.
        dtype: the dtype of everything that is not quantised; None takes what most of the weights'
            kernels compute in.
        placed: from `place`, where there is more than one device; `device` is then the first.
        int8_cache: whether keys and values are kept in 8 bits.

    Raises:
        NoBackend: a layer that no kernel, or not the one named, can run.
    """
    not_built = None
    if not device.present and device.assume_built is None:
        not_built = make_plan(
            checkpoint,
            replace(device, assume_built=False),
            kernels,
            reference=reference,
            backend=None if backend == "exllama" else backend,
            dtype=dtype,
            placed=placed,
            int8_cache=int8_cache,
        )
        device = replace(device, assume_built=True)
    placed = placed or {}
    here = Place(device.torch_name, device)
    layers = checkpoint.layers.values()
    dequantized = tuple(layer for layer in layers if is_dequantized(layer.name))
    shape = shape_of(checkpoint)

    def plan(*, if_fits: bool) -> Plan:
        choices = tuple(
            choose(
                layer,
                (place_of(placed, layer.name) or here).device,
                kernels,
                only=backend,
                if_fits=if_fits,
            )
            for layer in layers
            if not is_dequantized(layer.name)
        )
        chosen_dtype = dtype or _usual_dtype(choices) or next(iter(layers)).half_dtype
        taken = _weight_bytes(checkpoint, choices, dequantized, chosen_dtype, placed)
        return Plan(
            reference=reference,
            path=checkpoint.path,
            device=device,
            config=checkpoint.config,
            choices=choices,
            dtype=chosen_dtype,
            weight_bytes=sum(taken.values()),
            checkpoint_bytes=checkpoint.size_bytes,
            kv_bytes_per_token=kv_bytes_per_token(shape, chosen_dtype, int8_cache=int8_cache),
            warnings=checkpoint.warnings,
            not_built=not_built,
            placed=placed,
            place_bytes=taken if placed else {},
            shape=shape,
            dequantized=dequantized,
            scratch_bytes=shared_scratch(choices, placed),
        )

    if placed:  # their layers were placed by what they take packed
        return plan(if_fits=False)
    best = plan(if_fits=True)
    if not any(map(depends_on_memory, best.choices)):
        return best
    headroom = check_headroom(
        device,
        memory_bytes=best.memory_bytes,
        kv_bytes_per_token=best.kv_bytes_per_token,
        shape=shape,
    )
    chosen = best if headroom.fits else plan(if_fits=False)
    choices = tuple(replace(choice, headroom=headroom.words) for choice in chosen.choices)
    return replace(chosen, choices=choices)


def shared_scratch(choices: Iterable[Choice], placed: Mapping[str, Place]) -> int:
    """Count what products take besides the weights: on each device, a kernel's largest once."""
    largest: dict[tuple[str, str], int] = {}
    for choice in choices:
        where = place_of(placed, choice.layer.name)
        key = where.device.torch_name if where else "", choice.chosen.kernel
        largest[key] = max(largest.get(key, 0), choice.chosen.scratch_bytes)
    return sum(largest.values())


def _usual_dtype(choices: Sequence[Choice]) -> str | None:
    """Return the dtype that kernels compute most weights in, or None where none runs any."""
    weights: Counter[str] = Counter()
    for choice in choices:
        weights[choice.chosen.dtype] += choice.layer.in_features * choice.layer.out_features
    return max(sorted(weights), key=lambda name: weights[name], default=None)


def _weight_bytes(
    checkpoint: Checkpoint,
    choices: Sequence[Choice],
    dequantized: Sequence[LayerSpec],
    dtype: str,
    placed: Mapping[str, Place],
) -> dict[str, int]:
    """Count what the weights take in each place; "" where there is one device."""
    size = 4 if dtype == "float32" else 2
    parts = {part for name in checkpoint.layers for part in checkpoint.layer_tensors(name)}
    taken: Counter[str] = Counter()
    for name, info in checkpoint.headers.items():
        if name not in parts and info.dtype in ("F16", "BF16", "F32"):
            where = place_of(placed, name)
            taken[where.name if where else ""] += prod(info.shape) * size
    for choice in choices:
        where = place_of(placed, choice.layer.name)
        taken[where.name if where else ""] += choice.chosen.prepared_bytes
    for layer in dequantized:
        where = place_of(placed, layer.name)
        taken[where.name if where else ""] += dequantized_bytes(layer, dtype)
    return dict(taken)
