"""Weights that stay in a source's files, and are in the model only while they are needed.

A block's weights are read as float32 when the block runs or is quantised, and given up afterwards,
so a model far larger than memory can be quantised. It takes a source each of whose tensors is one
of the model's as it lies, renamed at most, or one projection of one expert; a class that joins or
turns tensors as it loads them is read whole.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_plugin.chat.tokenizer import auto_tokenizer
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.tensors import TensorFiles
from gptq_loader_plugin.checkpoint.transformers_config import UNBUILDABLE
from gptq_loader_plugin.checkpoint.weight_files import find_weight_files
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.model.meta import MetaDevice, empty_parameters
from gptq_loader_plugin.model.pictures import auto_class, reads_pictures
from gptq_loader_plugin.model.tensor_names import ExpertPlace, ModulePlace, Names
from gptq_loader_plugin.quantize.blocks import find_blocks, separate_experts
from gptq_loader_plugin.quantize.writer import hub_names
from gptq_loader_plugin.system.heap import release_freed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["StreamedWeights", "stream_model"]


class StreamedWeights:
    """The weights of a model without any, block by block.

    Args:
        model: its parameters are on the meta device, and its experts separate.
        files: what holds the weights.
        stored: the name in the files of every parameter, by its path in the model.
        names: from `hub_names`.

    Attributes:
        names: the same.
        largest: the bytes of the largest block, in float32.
        rest: the bytes of what lies outside the blocks, in float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: TensorFiles,
        stored: Mapping[str, str],
        names: Mapping[str, str],
    ) -> None:
        self.names = dict(names)
        self._model = model
        self._files = files
        self._stored = dict(stored)
        self._blocks = {block.path: block.module for block in find_blocks(model)}
        self._held: set[str] = set()
        self._changed: dict[str, Callable[[], None]] = {}
        sizes = {path: _bytes(module) for path, module in self._blocks.items()}
        self.largest = max(sizes.values())
        self.rest = _bytes(model) - sum(sizes.values())
        self._hooks = [model.register_forward_pre_hook(lambda *_: self._load_rest())]
        for path, module in self._blocks.items():
            before, after = self._hooks_of(path)
            self._hooks += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after),
            ]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one parameter by its path in the model, in float32 where it is floating point."""
        # A tensor of inference mode could not take part in tuning a block.
        with torch.inference_mode(mode=False):
            tensor = self._files.tensor(self._stored[name])
            return tensor.float() if tensor.is_floating_point() else tensor

    @contextmanager
    def held(self, path: str) -> Iterator[None]:
        """Keep a block's weights in the model, inside; they may be changed."""
        self._held.add(path)
        self._load(path)
        try:
            yield
        finally:
            self._held.discard(path)
            self._release(path)

    def change(self, path: str, apply: Callable[[], None]) -> None:
        """Call `apply` whenever a block was read from now on: it sets the quantised weights."""
        self._changed[path] = apply

    def release(self) -> None:
        """Give up every weight that is not held."""
        for name, _ in list(self._model.named_parameters()):
            if not any(name.startswith(f"{path}.") for path in self._held):
                self._set(name, None)
        self._model.tie_weights()  # else a tied head keeps what the embedding had
        release_freed()

    def load_all(self) -> None:
        """Read every weight, to stay: the model is a whole one from now on."""
        for hook in self._hooks:
            hook.remove()
        self._load_rest()
        for path in self._blocks:
            self._load(path)

    def _hooks_of(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(*_: object) -> None:
            if path not in self._held:
                self._load(path)

        def after(*_: object) -> None:
            if path not in self._held:
                self._release(path)

        return before, after

    def _load(self, path: str) -> None:
        for name, parameter in list(self._blocks[path].named_parameters()):
            if parameter.is_meta:
                self._set(f"{path}.{name}", self.tensor(f"{path}.{name}"))
        if path in self._changed:
            self._changed[path]()

    def _load_rest(self) -> None:
        missing = [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.is_meta and not self._is_of_block(name)
        ]
        for name in missing:
            self._set(name, self.tensor(name))
        if missing:
            self._model.tie_weights()

    def _release(self, path: str) -> None:
        for name, _ in list(self._blocks[path].named_parameters()):
            self._set(f"{path}.{name}", None)
        release_freed()

    def _is_of_block(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") for path in self._blocks)

    def _set(self, name: str, tensor: torch.Tensor | None) -> None:
        """Set a parameter, or empty it."""
        path, _, leaf = name.rpartition(".")
        own = self._model.get_submodule(path)
        with torch.inference_mode(mode=False):
            if tensor is None:
                tensor = torch.empty_like(own.get_parameter(leaf), device="meta")
            setattr(own, leaf, nn.Parameter(tensor, requires_grad=False))


def stream_model(
    folder: Path,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, StreamedWeights] | None:
    """Build a folder's model without weights, which are read when they are needed.

    Returns:
        The model, its tokenizer and its weights; None where it has to be read whole.
    """
    from transformers import AutoConfig, GenerationConfig, GenerationMixin

    try:
        headers = read_headers(find_weight_files(folder).files)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if reads_pictures(config):
            return None
        with MetaDevice(torch.float32):
            model: Any = auto_class(config).from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        if not issubclass(type(model), GenerationMixin):
            return None
        empty_parameters(model)
        stored = _stored(model, headers)
        if stored is None:
            return None
        names = hub_names(model)
        separate_experts(model)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        weights = StreamedWeights(model, TensorFiles(headers), stored, names)
        tokenizer = auto_tokenizer(folder)
    except (*UNBUILDABLE, GPTQLoaderError, OSError, ImportError, RuntimeError):
        return None  # reading it whole says what is wrong
    for name, buffer in list(model.named_buffers()):
        if name in stored:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, weights.tensor(name).to(buffer.dtype))
    return model.eval(), tokenizer, weights


def _stored(model: PreTrainedModel, headers: Mapping[str, Any]) -> dict[str, str] | None:
    """Find each parameter's tensor, by its path once experts are separate; None without one."""
    places, stored = Names(model), {}
    for name in headers:
        match places.place(name):
            case ExpertPlace(parent=parent, expert=expert, role=role):
                leaf = name.rpartition(".")[2]
                stored[f"{parent}.experts.{expert}.{role}.{leaf}"] = name
            case ModulePlace(path=path):
                stored[path] = name
            case None:
                pass
    separate = copy.deepcopy(model)
    separate_experts(separate)
    separate.tie_weights()
    shapes = {name: it.shape for name, it in separate.named_parameters()}
    every = [name for name, _ in separate.named_parameters(remove_duplicate=False)]
    tied = set(every) - set(shapes)
    head = separate.get_output_embeddings()
    heads = {f"{name}.weight" for name, module in separate.named_modules() if module is head}
    if not tied <= heads or tied & stored.keys() or any(it.is_meta for it in model.buffers()):
        return None
    fits = all(
        name in stored and tuple(headers[stored[name]].shape) == tuple(shape)
        for name, shape in shapes.items()
    )
    return stored if fits else None


def _bytes(module: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in module.parameters())
