"""Stream a checkpoint's tensors into a skeleton, layer by layer, into the kernels of a plan.

Every tensor is accounted for: what is missing or does not fit is an error that names it; what is
there beyond need is one warning, or an error where it belongs to a layer of the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_plugin.checkpoint.tensor_info import DAMAGED
from gptq_loader_plugin.checkpoint.tensors import is_finite
from gptq_loader_plugin.errors import CorruptCheckpoint, TensorMismatch
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.model.experts import PackedExperts
from gptq_loader_plugin.model.linears import linear_shape
from gptq_loader_plugin.model.offload import offload_module, offload_tensor
from gptq_loader_plugin.model.tensor_names import ExpertPlace, ModulePlace, Names
from gptq_loader_plugin.planning.choose import prepared
from gptq_loader_plugin.system.heap import release_freed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.kernel import LayerSpec
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
        self.foreign: list[str] = []

    def run(self) -> Filled:
        places = {
            name: self.names.layer(name, self.checkpoint)
            for name in (*self.choices, *self.dequantized)
        }
        self._find_dequantized(places)
        self._make_experts([place for place in places.values() if isinstance(place, ExpertPlace)])
        order = reading_order(self.checkpoint)
        done, total = 0, sum(info.nbytes for _, parts in order for info in parts)
        for name, parts in order:
            if name in self.dequantized:
                self._dequantize(self.dequantized[name], places[name])
            elif name in self.choices:
                self._place_layer(self.choices[name], places[name])
            else:
                self._place_tensor(name)
            done += sum(info.nbytes for info in parts)
            self.progress(Progress("weights", done, total, "bytes", name))
        self._fuse()
        self._finish()
        release_freed()
        return Filled(self.modules, tuple(self.dequantized.values()), tuple(self._warnings()))

    def _find_dequantized(self, places: Mapping[str, ModulePlace | ExpertPlace]) -> None:
        """Find the layers whose modules read their weight by themselves: no linear layers."""
        for name, place in places.items():
            if name in self.choices and isinstance(place, ModulePlace):
                module = self.model.get_submodule(place.path)
                if linear_shape(module) is None and hasattr(module, "weight"):
                    self.dequantized[name] = self.choices[name].layer

    def _make_experts(self, places: list[ExpertPlace]) -> None:
        for parent in dict.fromkeys(place.parent for place in places):
            fused: Any = self.model.get_submodule(parent)
            packed = PackedExperts(fused.num_experts, fused.act_fn)
            self.model.set_submodule(parent, packed)
            self.experts[parent] = packed

    def _place_layer(self, choice: Choice, place: ModulePlace | ExpertPlace) -> None:
        layer = choice.layer
        if isinstance(place, ModulePlace):
            self._check_shape(layer, self.model.get_submodule(place.path), place.path)
        packed = self.checkpoint.packed(layer.name)
        where = self.plan.place(layer.name)
        module = prepared(choice.kernel, layer, packed, where.device).to(where.device.torch_name)
        module.eval()
        if where.on_disk and self.offload_folder is not None:
            offload_module(module, self.offload_folder)
        self.modules[layer.name] = module
        del packed
        release_freed()
        if isinstance(place, ExpertPlace):
            self.experts[place.parent].place(place.expert, place.role, module)
        else:
            self.model.set_submodule(place.path, module)

    def _dequantize(self, layer: LayerSpec, place: ModulePlace | ExpertPlace) -> None:
        """Put a layer's weight, [N, K], where a module reads it by itself."""
        packed = self.checkpoint.packed(layer.name)
        weight = packed.dequantize().to(self.dtype)
        if isinstance(place, ExpertPlace):
            linear = _linear(self._placed(layer.name, weight))
            self.experts[place.parent].place(place.expert, place.role, linear)
            return
        module = self.model.get_submodule(place.path)
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
        parent = target.rpartition(".")[0]
        if converter is not None:
            tensor = self._read(name)
            if parent in self.experts:
                place = self.names.layer(name.removesuffix(".weight"), self.checkpoint)
                if isinstance(place, ExpertPlace):
                    self.experts[parent].place(place.expert, place.role, _linear(tensor))
                return
            _, collected = self.fused.setdefault(target, (converter, {}))
            collected.setdefault(str(pattern), []).append((name, tensor))
        elif self.names.exists(target):
            self._assign(target, self._read(name), name)
        elif self.names.inside_a_block(target):
            raise self._mismatch(
                name,
                "belongs to a layer of the model and has no place in it",
                hint="check that config.json is of this checkpoint; update transformers if the "
                "model is newer than it",
            )
        else:
            self.foreign.append(name)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.tensor(name)
        if not tensor.is_floating_point():
            return self._placed(name, tensor.clone())  # the model outlives the file
        own = torch.empty(tensor.shape, dtype=self.dtype)
        parts = (values.flatten().split(COPIED_VALUES) for values in (tensor, own))
        for source, target in zip(*parts, strict=True):
            if not is_finite(source):
                raise CorruptCheckpoint(
                    f"{name} holds values that are not finite",
                    path=self.checkpoint.path,
                    tensor=name,
                    hint=DAMAGED,
                )
            target.copy_(source)
        return self._placed(name, own)

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
        """Join tensors that transformers keeps as one, by its own operations."""
        for target, (converter, collected) in self.fused.items():
            tensors: Any = {
                pattern: [tensor for _, tensor in sorted(parts, key=_natural)]
                for pattern, parts in collected.items()
            }
            for operation in converter.operations:
                tensors = operation.convert(
                    tensors,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=target,
                    model=self.model,
                    config=self.model.config,
                    missing_keys=None,
                )
            source = next(iter(collected.values()))[0][0]
            for pattern, value in tensors.items():
                tensor = value[0] if isinstance(value, list) else value
                end = target.index(converter.target_patterns[0])
                suffix = target[end + len(converter.target_patterns[0]) :]
                self._assign(target[:end] + pattern + suffix, tensor, source)

    def _finish(self) -> None:
        """Tie what the config ties, then find what is still without a value."""
        for parent, packed in self.experts.items():
            if missing := packed.missing():
                raise self._mismatch(f"{parent}.{missing[0]}", "is missing: an expert's weight")
        self._tie()
        for name, value in (*self.model.named_parameters(), *self.model.named_buffers()):
            if value.is_meta:
                raise self._mismatch(name, "is missing")
        for path, module in self.model.named_modules():  # what is computed: rotary frequencies
            where = self.plan.place(path).device.torch_name
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(where))
        self.model.requires_grad_(False)  # noqa: FBT003 - torch's signature

    def _tie(self) -> None:
        head, embedding = self.model.get_output_embeddings(), self._embedding()
        if head is None or not isinstance(head, nn.Linear):  # a quantised head is tied to nothing
            self.model.config.tie_word_embeddings = False
        elif head.weight.is_meta:
            self.model.tie_weights()
            # While another thread loads a model, transformers has taken tie_weights away.
            if head.weight.is_meta and self.model.config.tie_word_embeddings:
                head.weight = embedding.weight
        elif embedding.weight.is_meta and self.model.config.tie_word_embeddings:
            embedding.weight = head.weight  # some writers kept the head's name of the two

    def _embedding(self) -> Any:  # noqa: ANN401 - a module with a weight
        return self.model.get_input_embeddings()

    def _warnings(self) -> list[str]:
        if not self.foreign:
            return []
        roots = dict.fromkeys(
            re.sub(r"\.\d+\..*", "", name).rpartition(".")[0] or name for name in self.foreign
        )
        named = ", ".join(list(roots)[:4])
        return [f"{len(self.foreign)} tensors of parts this model lacks were not read: {named}"]

    def _mismatch(self, tensor: str, what: str, *, hint: str = DAMAGED) -> TensorMismatch:
        return TensorMismatch(
            f"{tensor} {what}", path=self.checkpoint.path, tensor=tensor, hint=hint
        )


def _linear(weight: torch.Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _natural(part: tuple[str, torch.Tensor]) -> list[int | str]:
    """Order names with numbers in them as people do: experts.2 before experts.10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", part[0])]
