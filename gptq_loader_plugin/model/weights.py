"""Stream a checkpoint's tensors into a skeleton, layer by layer, into the kernels of a plan.

Every tensor is accounted for: what is missing or does not fit is an error that names it; what is
there beyond need is one warning, or an error where it belongs to a layer of the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_plugin.checkpoint.tensor_info import DAMAGED
from gptq_loader_plugin.checkpoint.tensors import is_finite
from gptq_loader_plugin.errors import CorruptCheckpoint, TensorMismatch
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.model.expert_layers import expert_layers
from gptq_loader_plugin.model.experts import PackedExperts
from gptq_loader_plugin.model.float32 import kept_in_float32
from gptq_loader_plugin.model.foreign_tensors import foreign_warnings
from gptq_loader_plugin.model.joined import JoinedLinears, fused_tensors, tie_weights
from gptq_loader_plugin.model.linears import linear_shape, plain_linear
from gptq_loader_plugin.model.offload import offload_module, offload_tensor
from gptq_loader_plugin.model.tensor_names import (
    ExpertPlace,
    JoinedPlace,
    LayerPlace,
    ModulePlace,
    Names,
    SplitPlace,
)
from gptq_loader_plugin.planning.choose import prepared
from gptq_loader_plugin.system.heap import release_freed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear
    from gptq_loader_plugin.planning.choose import Choice
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["Filled", "fill", "reading_order"]

COPIED_VALUES = 1 << 18  # at a time, so that they are checked and converted while in cache
# Buffers that earlier versions of transformers saved and that every version computes anew.
COMPUTED = re.compile(
    r".*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attn\.bias|attention\.bias"
    r"|attn\.attention\.bias|position_ids|wf)"
)


def fill(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    progress: Callable[[Progress], None],
    offload_folder: Path | None = None,
) -> Filled:
    """Put every tensor of `checkpoint` into `model`.

    Args:
        model: a skeleton, its parameters on the meta device; it is complete afterwards.
        checkpoint: where the tensors come from, read one layer at a time.
        plan: which kernel prepares which layer.
        progress: called with the bytes read so far, of all.
        offload_folder: where the weights go that the plan has on the disk.

    Returns:
        Where every quantised layer is now, and warnings: what was left unread, in one sentence.

    Raises:
        TensorMismatch: a tensor is missing, does not fit, or belongs to a layer and is not used.
        CorruptCheckpoint: a tensor holds values that are not finite.
    """
    return _Filling(model, checkpoint, plan, progress, offload_folder).run()


@dataclass(frozen=True, slots=True)
class Filled:
    """What `fill` did.

    Attributes:
        modules: the prepared module of every quantised layer that a kernel runs, by its name.
        dequantized: the quantised layers that belong to no linear layer.
        warnings: what was left unread.
    """

    modules: dict[str, nn.Module]
    dequantized: tuple[LayerSpec, ...]
    warnings: tuple[str, ...]


def reading_order(checkpoint: Checkpoint) -> list[tuple[str, list[TensorInfo]]]:
    """List what `fill` reads, in its order: a layer's name with its parts, a tensor's with it."""
    headers = checkpoint.headers
    owners = {
        tensor: layer for layer in checkpoint.layers for tensor in checkpoint.layer_tensors(layer)
    }
    order: dict[str, list[TensorInfo]] = {}
    for name, info in headers.items():  # a layer is read where its first tensor lies
        order.setdefault(owners.get(name, name), []).append(info)
    return list(order.items())


class _Filling:
    """One run of `fill`: what is placed, what is collected for fusing, what is left over."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        plan: Plan,
        progress: Callable[[Progress], None],
        offload_folder: Path | None,
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.plan = plan
        self.progress = progress
        self.offload_folder = offload_folder
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        self.names = Names(model)
        self.choices = {choice.layer.name: choice for choice in plan.choices}
        self.dequantized = {layer.name: layer for layer in plan.dequantized}
        self.experts: dict[str, PackedExperts] = {}
        self.fused: dict[str, tuple[Any, dict[str, list[tuple[str, torch.Tensor]]]]] = {}
        self.modules: dict[str, nn.Module] = {}
        self.prepared: set[str] = set()
        self.joined: dict[str, JoinedLinears] = {}
        self.foreign: list[str] = []
        self.expert_tensors: dict[ExpertPlace, dict[str, torch.Tensor]] = {}
        self.tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
        self.float32 = kept_in_float32(model, self.dtype)

    def run(self) -> Filled:
        places = {
            name: self.names.layer(name, self.checkpoint)
            for name in (*self.choices, *self.dequantized)
            if not self.names.is_left_out(name)
        }
        self._find_dequantized(places)
        separate = [*places.values(), *self._separate_experts()]
        self._make_experts([place for place in separate if isinstance(place, ExpertPlace)])
        order = reading_order(self.checkpoint)
        done, total = 0, sum(info.nbytes for _, parts in order for info in parts)
        for name, parts in order:
            if name in self.dequantized and name in places:
                self._dequantize(self.dequantized[name], places[name])
            elif name in places:
                self._place_layer(self.choices[name], places[name])
                release_freed()
            elif name in self.choices:
                self.foreign += [info.name for info in parts]
            else:
                self._place_tensor(name)
            done += sum(info.nbytes for info in parts)
            self.progress(Progress("weights", done, total, "bytes", name))
        self._fuse()
        self._finish()
        release_freed()
        warnings = tuple(foreign_warnings(self.foreign, self.names))
        return Filled(self.modules, tuple(self.dequantized.values()), warnings)

    def _find_dequantized(self, places: Mapping[str, LayerPlace]) -> None:
        """Find the layers whose modules read their weight by themselves: no linear layers."""
        for name, place in places.items():
            if name in self.choices and isinstance(place, ModulePlace):
                module = self.model.get_submodule(place.path)
                if linear_shape(module) is None and hasattr(module, "weight"):
                    self.dequantized[name] = self.choices[name].layer

    def _separate_experts(self) -> list[ExpertPlace]:
        """List experts in 16 bits that transformers has no way to fuse."""
        places = {name: self.names.place(name) for name in self.checkpoint.headers}
        return [
            place
            for name, place in places.items()
            if isinstance(place, ExpertPlace) and self.names.target(name)[1] is None
        ]

    def _make_experts(self, places: list[ExpertPlace]) -> None:
        for parent in dict.fromkeys(place.parent for place in places):
            self.experts[parent] = PackedExperts(self.model.get_submodule(parent))
            self.model.set_submodule(parent, self.experts[parent])

    def _place_layer(self, choice: Choice, place: LayerPlace) -> None:
        if isinstance(place, ExpertPlace):
            return self._place_expert(choice, place)
        if isinstance(place, SplitPlace):
            return self._place_split(choice, place)
        layer = choice.layer
        if isinstance(place, ModulePlace):
            self._check_shape(layer, self.model.get_submodule(place.path), place.path)
        module = self._prepare(choice, layer, self.checkpoint.packed(layer.name))
        if isinstance(place, JoinedPlace):
            return self._join(layer, place, module)
        self.model.set_submodule(place.path, module)
        self.prepared.add(place.path)
        return None

    def _prepare(self, choice: Choice, layer: LayerSpec, packed: PackedLinear) -> nn.Module:
        """Have a kernel prepare a layer, or some columns of one, where the plan has it."""
        where = self.plan.place(choice.layer.name)
        module = prepared(choice.kernel, layer, packed, where.device).to(where.device.torch_name)
        module.eval()
        if where.on_disk and self.offload_folder is not None:
            offload_module(module, self.offload_folder)
        self.modules[layer.name] = module
        return module

    def _place_expert(self, choice: Choice, place: ExpertPlace) -> None:
        if not self._has_expert(choice.layer.name, place):
            return
        experts, packed = self.experts[place.parent], self.checkpoint.packed(choice.layer.name)
        for role, layer, part in expert_layers(choice, place.role, experts, packed, self.plan):
            experts.place(place.expert, role, self._prepare(choice, layer, part))

    def _join(self, layer: LayerSpec, place: JoinedPlace, module: nn.Module) -> None:
        """Put a layer beside those that make up one module with it."""
        if place.path not in self.joined:
            shape = linear_shape(self.model.get_submodule(place.path)) or (0, 0)
            self.joined[place.path] = JoinedLinears(*shape, place.count)
        joined = self.joined[place.path]
        joined.place(place.index, module, layer.out_features)
        if joined.width is None:
            return
        shape = layer.in_features, joined.width
        if shape != (joined.in_features, joined.out_features):
            raise self._mismatch(
                layer.name,
                f"makes up a layer of {shape[0]}x{shape[1]} with those beside it; config.json "
                f"makes it {joined.in_features}x{joined.out_features}",
            )
        self.model.set_submodule(place.path, joined)
        self.prepared.add(place.path)

    def _has_expert(self, name: str, place: ExpertPlace) -> bool:
        """Whether the model has that expert; LongCat's files have some that compute nothing."""
        experts = self.experts[place.parent]
        if place.expert >= experts.num_experts and not experts.passes_on:
            what = f"is of an expert beyond the {experts.num_experts} that config.json names"
            raise self._mismatch(name, what)
        return place.expert < experts.num_experts

    def _place_split(self, choice: Choice, place: SplitPlace) -> None:
        """Cut a layer's columns into the modules that the model has for them."""
        packed = self.checkpoint.packed(choice.layer.name)
        for path, columns in place.columns.items():
            layer = replace(choice.layer, name=path, out_features=len(columns))
            self._check_shape(layer, self.model.get_submodule(path), path)
            own = packed.take_columns(columns)
            self.model.set_submodule(path, self._prepare(choice, layer, own))

    def _dequantize(self, layer: LayerSpec, place: LayerPlace) -> None:
        """Put a layer's weight, [N, K], where a module reads it by itself."""
        packed = self.checkpoint.packed(layer.name)
        weight = packed.dequantize()
        if isinstance(place, ExpertPlace):
            linear = plain_linear(self._placed(layer.name, weight.to(self.dtype)))
            self.experts[place.parent].place(place.expert, place.role, linear)
            return
        if isinstance(place, SplitPlace | JoinedPlace):
            raise self._mismatch(f"{layer.name}.qweight", "is of a layer that this class divides")
        module = self.model.get_submodule(place.path)
        weight = weight.to(self._dtype(f"{place.path}.weight", None))
        self._assign(f"{place.path}.weight", self._placed(layer.name, weight), layer.name)
        bias: torch.Tensor | None = getattr(module, "bias", None)
        if (packed.bias is not None and bias is None) or (bias is not None and not layer.bias):
            what = "is missing" if packed.bias is None else f"has no place in {place.path}"
            raise self._mismatch(f"{layer.name}.bias", what)
        if bias is not None:
            own = torch.zeros_like(weight[:, 0]) if packed.bias is None else packed.bias
            own = self._placed(layer.name, own.to(self.dtype))
            self._assign(f"{place.path}.bias", own, f"{layer.name}.bias")

    def _check_shape(self, layer: LayerSpec, module: nn.Module, path: str) -> None:
        shape = linear_shape(module)
        if shape is None:
            raise self._mismatch(
                layer.name, f"{path} is a {type(module).__name__}, not a linear layer"
            )
        if shape != (layer.in_features, layer.out_features):
            raise self._mismatch(
                layer.name,
                f"holds a layer of {layer.in_features}x{layer.out_features}; config.json makes it "
                f"{shape[0]}x{shape[1]}",
            )
        has_bias = getattr(module, "bias", None) is not None
        if has_bias and not layer.bias:
            raise self._mismatch(f"{layer.name}.bias", "is missing")

    def _place_tensor(self, name: str) -> None:
        if COMPUTED.fullmatch(name):
            return  # a file may have it in half precision
        target, converter, pattern = self.names.target(name)
        place = self.names.place(name)
        if isinstance(place, ExpertPlace) and place.parent in self.experts:
            if not self._has_expert(name, place):
                return
            parts = self.expert_tensors.setdefault(place, {})
            parts["bias" if name.endswith("bias") else "weight"] = self._read(name, target)
        elif converter is not None:
            tensor = self._read(name, target)
            _, collected = self.fused.setdefault(target, (converter, {}))
            collected.setdefault(str(pattern), []).append((name, tensor))
        elif self.names.exists(target):
            self._assign(target, self._read(name, target), name)
        elif self.names.inside_a_block(target):
            raise self._mismatch(
                name,
                "belongs to a layer of the model and has no place in it",
                hint="check that config.json is of this checkpoint; update transformers if the "
                "model is newer than it",
            )
        else:
            self.foreign.append(name)

    def _read(self, name: str, target: str) -> torch.Tensor:
        tensor = self.checkpoint.tensor(name)
        if not tensor.is_floating_point():
            return self._placed(name, tensor.clone())  # the model outlives the file
        old = self.names.parameter(target)
        unlimited = old is not None and not old.is_meta and bool(torch.isinf(old).any())
        own = torch.empty(tensor.shape, dtype=self._dtype(target, old))
        parts = (values.flatten().split(COPIED_VALUES) for values in (tensor, own))
        for source, converted in zip(*parts, strict=True):
            if not is_finite(source) and not (unlimited and not bool(source.isnan().any())):
                raise CorruptCheckpoint(
                    f"{name} holds values that are not finite",
                    path=self.checkpoint.path,
                    tensor=name,
                    hint=DAMAGED,
                )
            converted.copy_(source)
        return self._placed(name, own)

    def _dtype(self, target: str, old: torch.Tensor | None) -> torch.dtype:
        """Return what transformers loads a tensor in: some classes keep some in float32."""
        if self.float32 is not None and self.float32.search(target):
            return torch.float32
        keeps = old is not None and old.dtype == torch.float32 and old.is_floating_point()
        return torch.float32 if keeps else self.dtype

    def _placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        where = self.plan.place(name)
        if where.on_disk and self.offload_folder is not None:
            return offload_tensor(tensor, self.offload_folder)
        return tensor.to(where.device.torch_name)

    def _assign(self, target: str, tensor: torch.Tensor, source: str) -> None:
        path, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(path)
        old = getattr(module, leaf)
        if tuple(old.shape) != tuple(tensor.shape):
            raise self._mismatch(
                source, f"is {list(tensor.shape)}; config.json makes it {list(old.shape)}"
            )
        if leaf in module._parameters:  # noqa: SLF001 - the one way to tell it from a buffer
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(module, leaf, tensor)

    def _fuse(self) -> None:
        """Join tensors that transformers keeps as one."""
        for target, (converter, collected) in self.fused.items():
            source = next(iter(collected.values()))[0][0]
            for name, tensor in fused_tensors(self.model, target, converter, collected).items():
                self._assign(name, tensor, source)

    def _finish(self) -> None:
        """Tie what the config ties, then find what is still without a value."""
        for place, parts in self.expert_tensors.items():
            if "weight" in parts:
                self.experts[place.parent].place(place.expert, place.role, plain_linear(**parts))
        for parent, packed in self.experts.items():
            if missing := packed.missing():
                raise self._mismatch(f"{parent}.{missing[0]}", "is missing: an expert's weight")
        tie_weights(self.model, self.tied, self.checkpoint.translated or {}, prepared=self.prepared)
        for name, value in (*self.model.named_parameters(), *self.model.named_buffers()):
            if value.is_meta:
                raise self._mismatch(name, "is missing")
        for path, module in self.model.named_modules():  # what is computed: rotary frequencies
            where = self.plan.place(path).device.torch_name
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(where))
        self.model.requires_grad_(False)  # noqa: FBT003 - torch's signature

    def _mismatch(self, tensor: str, what: str, *, hint: str = DAMAGED) -> TensorMismatch:
        return TensorMismatch(
            f"{tensor} {what}", path=self.checkpoint.path, tensor=tensor, hint=hint
        )
