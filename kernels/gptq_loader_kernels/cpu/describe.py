"""Describe a Llama-like decoder to the native library, as it stands; imports torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_kernels.cpu.library import (
    NORMS,
    PARTS,
    Activations,
    DecoderLayer,
    Isa,
    Model,
    Projection,
)
from gptq_loader_kernels.cpu.linear import TYPES, NativeLinear
from gptq_loader_plugin.model.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Described", "all_packed", "describe", "linears", "why_not"]

FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
LANES = 16
ACTIVATIONS = ("SiLUActivation", "SiLU")
# Ways to compute the same attention; another name is somebody's own.
ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, slots=True)
class Described:
    """A decoder as the library reads it.

    Attributes:
        model: the description, which points into the decoder's tensors.
        dtype: of its activations.
        kept: what the description points to: the decoder's own tensors, of which nothing is copied.
        watch: tells whether the decoder has been changed since.
    """

    model: Model
    dtype: torch.dtype
    kept: list[Any]
    watch: Watch


def describe(
    decoder: Any,  # noqa: ANN401
    dtype: torch.dtype,
    isa: Isa,
    activations: Activations,
) -> Described | None:
    """Describe a decoder for activations of `dtype`; None where the library cannot run it."""
    if why_not(decoder) is not None:
        return None
    if decoder.norm.weight.dtype != dtype and not all_packed(decoder):
        return None
    kept: list[Any] = []

    def norm(owner: nn.Module, path: str) -> int | None:
        module = _find(owner, path)
        if module is None:
            return None
        kept.append(module.weight)
        return int(kept[-1].data_ptr())

    described = (DecoderLayer * len(decoder.layers))()
    for index, (place, layer) in enumerate(zip(described, decoder.layers, strict=True)):
        before: Any = None
        for name, path in PARTS.items():
            module = layer.get_submodule(path)
            _describe(getattr(place, name), module, kept)
            follows = name in {"k", "v", "up"} and _same_rows(before, module)
            getattr(place, name).same_rows = follows
            before = module
        for name, path in NORMS.items():
            setattr(place, name, norm(layer, path))
        place.window = _window(decoder, index)
    config, attention = decoder.config, decoder.layers[0].self_attn
    model = Model(
        layers=len(described),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        intermediate=config.intermediate_size,
        type=TYPES[dtype],
        isa=isa,
        activations=activations,
        parameter_type=TYPES[decoder.norm.weight.dtype],
        eps=decoder.norm.variance_epsilon,
        scale=attention.scaling,
        norm=norm(decoder, "norm"),
        layer=ctypes.cast(described, ctypes.POINTER(DecoderLayer)),
    )
    kept.append(described)
    return Described(model, dtype, kept, Watch(decoder, list(modules_inside(decoder))))


def why_not(decoder: Any) -> str | None:  # noqa: ANN401 - one for each limit
    """Say what keeps a decoder from stepping natively, in words."""
    kind = type(decoder).__name__
    if kind not in FAMILIES or not type(decoder).__module__.startswith("transformers.models."):
        return "it is not one of Llama, Mistral, Qwen2 and Qwen3"
    config = decoder.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}; the step has silu"
    attention = decoder.layers[0].self_attn
    if attention.head_dim % (2 * LANES) or attention.head_dim > 16 * LANES:
        return f"its heads are {attention.head_dim} wide; the step takes multiples of 32 up to 256"
    if config.hidden_size % LANES:
        return f"its hidden size {config.hidden_size} is not a multiple of {LANES}"
    if decoder.norm.weight.dtype not in TYPES:
        return f"it is in {decoder.norm.weight.dtype}; the step takes bfloat16 and float32"
    return _changed(decoder) or _computed_otherwise(decoder) or _misfit(decoder)


def modules_inside(decoder: Any) -> Iterator[nn.Module]:  # noqa: ANN401
    """Go through the modules whose place a step takes."""
    yield from decoder.layers.modules()
    yield decoder.norm


def _changed(decoder: Any) -> str | None:  # noqa: ANN401
    """Say which part of a decoder is not as transformers and the native kernel make it."""
    for layer in decoder.layers:
        for path in PARTS.values():
            module = _find(layer, path)
            if not isinstance(module, NativeLinear) and type(module) is not nn.Linear:
                return f"{path} is multiplied by another kernel"
    for module in modules_inside(decoder):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:  # noqa: SLF001 - torch has no other way to tell
            return f"something watches a {type(module).__name__} of it"
    return None


def _computed_otherwise(decoder: Any) -> str | None:  # noqa: ANN401
    """Say what a decoder computes by that the step does not, or has only one of."""
    kinds = list(_classes(decoder))
    family, module = type(decoder).__name__.removesuffix("Model"), type(decoder).__module__
    for path, kind, name in ((path, type(part), name) for path, part, name in kinds):
        if kind.__name__ != family + name or kind.__module__ != module:
            return f"{path} is a {kind.__name__}, and not transformers' own"
    numbers = {
        "epsilon": {part.variance_epsilon for _, part, name in kinds if name == "RMSNorm"},
        "scaling": {layer.self_attn.scaling for layer in decoder.layers},
    }
    for name, values in numbers.items():
        if len(values) > 1:
            return f"its {name} is {' and '.join(map(str, sorted(values)))}; the step takes one"
    for index, layer in enumerate(decoder.layers):
        window = _window(decoder, index)
        if (getattr(layer.self_attn, "sliding_window", window) or 0) != window:
            return f"layers.{index} attends to another window than its config has"
    activations = {type(layer.mlp.act_fn).__name__ for layer in decoder.layers}
    if other := sorted(activations.difference(ACTIVATIONS)):
        return f"its activation is {other[0]}; the step has silu"
    attention = getattr(decoder.config, "_attn_implementation", None)
    return None if attention in ATTENTIONS else f"its attention is {attention}"


def _classes(decoder: Any) -> Iterator[tuple[str, Any, str]]:  # noqa: ANN401
    """Go through the modules whose place a step takes: path, module, and the end of its class."""
    yield "norm", decoder.norm, "RMSNorm"
    for i, layer in enumerate(decoder.layers):
        yield f"layers.{i}", layer, "DecoderLayer"
        for path, name in (("self_attn", "Attention"), ("mlp", "MLP")):
            yield f"layers.{i}.{path}", _find(layer, path), name
        for path in NORMS.values():
            if (norm := _find(layer, path)) is not None:
                yield f"layers.{i}.{path}", norm, "RMSNorm"


def _window(decoder: Any, index: int) -> int:  # noqa: ANN401
    """Return how many positions a layer attends to, or 0 for all: by the config, as its mask."""
    config = decoder.config
    kinds = getattr(config, "layer_types", None)
    if type(decoder).__name__ == "MistralModel" or (kinds and kinds[index] == "sliding_attention"):
        return int(config.sliding_window or 0)
    return 0


def _misfit(decoder: Any) -> str | None:  # noqa: ANN401
    """Say which part of a decoder has not got the size that the others give it, or is elsewhere.

    The library reads what it is told, whatever lies there.
    """
    config = decoder.config
    if config.num_attention_heads % config.num_key_value_heads:
        return f"its {config.num_key_value_heads} heads of keys and values are shared unevenly"
    for name, part, shape in _parts(decoder):
        if part is None:
            continue
        if isinstance(part, NativeLinear):
            actual = (part.out_features, part.in_features)
        elif part.device.type != "cpu":
            return f"{name} is on {part.device}"
        else:
            actual = part.shape
        if actual != shape:
            return (
                f"{name} is {' x '.join(map(str, actual))}, and not {' x '.join(map(str, shape))}"
            )
        if isinstance(part, torch.Tensor) and part.dtype != decoder.norm.weight.dtype:
            return f"{name} is in {part.dtype}, and its last norm in {decoder.norm.weight.dtype}"
        if isinstance(part, torch.Tensor) and not part.is_contiguous():
            return f"{name} is not contiguous"
    return None


def _parts(decoder: Any) -> Iterator[tuple[str, Any, tuple[int, ...]]]:  # noqa: ANN401
    """Go through what the library reads, layers and tensors, with the shapes they must have."""
    config, dim = decoder.config, decoder.layers[0].self_attn.head_dim
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes = {
        "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
        "gate": (intermediate, hidden), "up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }  # fmt: skip
    yield "norm", decoder.norm.weight, (hidden,)
    for layer in decoder.layers:
        for name, path in PARTS.items():
            module = _find(layer, path)
            if isinstance(module, NativeLinear):
                yield path, module, shapes[name]
            else:
                yield path, module.weight, shapes[name]
                yield path, module.bias, shapes[name][:1]
        for name, path in NORMS.items():
            weight = _find(layer, f"{path}.weight")
            yield path, weight, (dim if name in {"q_norm", "k_norm"} else hidden,)


def all_packed(decoder: Any) -> bool:  # noqa: ANN401
    """Say whether every layer of a decoder is packed."""
    return all(isinstance(it, NativeLinear) for it in linears(decoder))


def linears(decoder: Any) -> Iterator[Any]:  # noqa: ANN401
    """Go through the linears of a decoder's layers."""
    return (_find(layer, path) for layer in decoder.layers for path in PARTS.values())


def _describe(to: Projection, module: Any, kept: list[Any]) -> None:  # noqa: ANN401
    to.in_features, to.out_features = module.in_features, module.out_features
    if isinstance(module, NativeLinear):
        filled = module.filled()
        kept.append((module, filled))
        to.packed = ctypes.pointer(filled)
        return
    kept += module.weight, module.bias
    to.weight = module.weight.data_ptr()
    if module.bias is not None:
        to.bias = module.bias.data_ptr()


def _same_rows(one: Any, other: Any) -> bool:  # noqa: ANN401 - modules of either kind
    """Return whether two layers read x alike, so that it is permuted once for both."""
    if not isinstance(one, NativeLinear) or not isinstance(other, NativeLinear):
        return type(one) is type(other)
    names = ("rows", "segment_units")
    return one.bits == other.bits and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in names
    )


def _find(owner: Any, path: str) -> Any:  # noqa: ANN401
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner
