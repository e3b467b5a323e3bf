"""Say what keeps a decoder from stepping natively, part by part; imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_kernels.cpu.families import FAMILIES, Family, family_of, find
from gptq_loader_kernels.cpu.latents import latent_norms, other_latents
from gptq_loader_kernels.cpu.library import COLUMNS, Activation
from gptq_loader_kernels.cpu.linear import TYPES, NativeLinear
from gptq_loader_kernels.cpu.mixtures import (
    CLAMPED,
    ROLES,
    activations_of,
    correction_of,
    expert_sizes,
    experts_of,
    fused_of,
    groups_of,
    is_mixture,
    projections_of,
    router_of,
    shared_of,
    swiglu_of,
)
from gptq_loader_kernels.cpu.parts import (
    attention_of,
    head_dim_of,
    is_parallel,
    kv_heads_of,
    last_norm_of,
    norm_of,
    norms_of,
    projection_sizes,
    residual_of,
    rotary_sizes,
    rotated_of,
    sinks_of,
    softcap_of,
    window_of,
)
from gptq_loader_plugin.model.experts import PackedExperts

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ACTIVATIONS", "linears", "modules_inside", "why_not"]

LANES = 16
MAX_GROUPS = 64  # of experts
METHODS = ("greedy", "group_limited_greedy")  # of DeepSeek-V2's routers
ACTIVATIONS = {
    "SiLUActivation": Activation.SILU, "SiLU": Activation.SILU, "GELUTanh": Activation.GELU_TANH,
    "NewGELUActivation": Activation.GELU_TANH, "GELUActivation": Activation.GELU,
    CLAMPED: Activation.SWIGLU_OAI,
}  # fmt: skip
# Ways to compute the same attention; another name is somebody's own.
ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def why_not(decoder: Any) -> str | None:  # noqa: ANN401 - one for each limit
    """Say what keeps a decoder from stepping natively, in words."""
    family = family_of(decoder)
    if family is None:
        names = sorted(it.name for it in FAMILIES.values())
        return f"it is a {type(decoder).__name__}; the step has {', '.join(names)}"
    head_dim = head_dim_of(decoder, family)
    if not family.latent and (head_dim % LANES or head_dim > 16 * LANES):
        return f"its heads are {head_dim} wide; the step takes multiples of 16 up to 256"
    if decoder.config.hidden_size % LANES:
        return f"its hidden size {decoder.config.hidden_size} is not a multiple of {LANES}"
    dtype = last_norm_of(decoder, family).weight.dtype
    if dtype not in TYPES:
        return f"it is in {dtype}; the step takes bfloat16 and float32"
    checks = (
        other_latents,
        _other_mixture,
        _changed,
        _other_class,
        _several,
        _other_positions,
        _uncut,
        _misfit,
    )
    return next((reason for check in checks if (reason := check(decoder, family))), None)


def modules_inside(decoder: Any, family: Family) -> Iterator[nn.Module]:  # noqa: ANN401
    """Go through the modules whose place a step takes."""
    for module in decoder.layers.modules():
        yield module
        if isinstance(module, PackedExperts):
            yield module.fused
    yield last_norm_of(decoder, family)


def linears(decoder: Any, family: Family) -> Iterator[Any]:  # noqa: ANN401
    """Go through the linears of a decoder's layers."""
    return (module for _, module, _ in _named_linears(decoder, family))


def _named_linears(
    decoder: Any,  # noqa: ANN401
    family: Family,
) -> Iterator[tuple[str, Any, tuple[int, int]]]:
    """Go through a decoder's linears: path in a layer, module, outputs and inputs."""
    sizes, config = projection_sizes(decoder, family), decoder.config
    for layer in decoder.layers:
        for path, names in projections_of(layer, family).items():
            shape = sum(sizes[name][0] for name in names), sizes[names[0]][1]
            yield path, find(layer, path), shape
        if not is_mixture(layer, family):
            continue
        for index, expert in enumerate(experts_of(layer.mlp, family)):
            width = expert_sizes(config, family)[index == len(layer.mlp.experts.experts)]
            for role, module in expert.items():
                down = role == "down"
                shape = (config.hidden_size, width) if down else (width, config.hidden_size)
                yield f"mlp.experts.{index}.{role}", module, shape


def _changed(decoder: Any, family: Family) -> str | None:  # noqa: ANN401
    """Say which part of a decoder is not as transformers and the native kernel make it."""
    for path, module, _ in _named_linears(decoder, family):
        if not isinstance(module, NativeLinear) and type(module) is not nn.Linear:
            return f"{path} is multiplied by another kernel"
    for module in modules_inside(decoder, family):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:  # noqa: SLF001 - torch has no other way to tell
            return f"something watches a {type(module).__name__} of it"
    return None


def _other_class(decoder: Any, family: Family) -> str | None:  # noqa: ANN401
    """Say which module of a decoder is not of transformers' own class."""
    module = type(decoder).__module__
    for path, part, name in _classes(decoder, family):
        kind = type(part)
        torchs = name == _norm(family) and family.norm is None
        own = kind.__name__ == family.name + name and kind.__module__ == module
        if not (kind is nn.LayerNorm if torchs else own):
            return f"{path} is a {kind.__name__}, and not transformers' own"
        if name == _norm(family) and part.weight is None:
            return f"{path} has no weight"
    for name in family.refused:
        if getattr(decoder.config, name, False):
            return f"its config has {name}, of which the step has nothing"
    attention = getattr(decoder.config, "_attn_implementation", None)
    return None if attention in ATTENTIONS else f"its attention is {attention}"


def _other_mixture(decoder: Any, family: Family) -> str | None:  # noqa: ANN401
    """Say which mixture of a decoder is not made of the experts that the step has."""
    for i, mixture in enumerate(it.mlp for it in decoder.layers if is_mixture(it, family)):
        if fused_of(mixture) is None:
            return "its experts are fused: the step has those that are packed one by one"
        experts: Any = mixture.experts.experts
        if any(set(expert) != set(ROLES) for expert in experts):
            return f"the experts of mixture {i} have other layers than gate, up and down"
        method = getattr(router_of(mixture, family), "topk_method", METHODS[0])
        if method not in METHODS:
            return f"mixture {i} chooses experts by {method}, of which the step has nothing"
        if (reason := _other_router(mixture, family, len(experts))) is not None:
            return f"mixture {i} {reason}"
        shared_gate = getattr(mixture, "shared_expert_gate", None)
        if shared_gate is not None and type(shared_gate) is not nn.Linear:
            return "mlp.shared_expert_gate is multiplied by another kernel"
    return None


def _other_router(mixture: Any, family: Family, experts: int) -> str | None:  # noqa: ANN401
    """Say what a router chooses that the step cannot."""
    router, correction = router_of(mixture, family), correction_of(mixture, family)
    if not hasattr(router, "top_k"):
        return f"chooses experts outside of its {type(router).__name__}"
    if router.top_k > experts:
        return f"takes {router.top_k} of {experts} experts"
    dtypes = {it.dtype for it in (router.weight, getattr(router, "bias", None)) if it is not None}
    if not dtypes <= TYPES.keys() or len(dtypes) > 1:
        return f"has a router in {' and '.join(sorted(map(str, dtypes)))}"
    if correction is not None and correction.dtype != torch.float32:
        return f"corrects its scores in {correction.dtype}; the step takes float32"
    groups, kept = groups_of(router)
    possible = 1 <= kept <= groups <= MAX_GROUPS and experts % groups == 0
    size = experts // groups if possible else 0
    if size < min(groups, 1 if family.groups_by_best else 2) or router.top_k > kept * size:
        return f"takes {router.top_k} of {experts} experts, of {kept} of {groups} groups"
    return None


def _several(decoder: Any, family: Family) -> str | None:  # noqa: ANN401
    """Say what a decoder has several of, where the step takes one."""
    inside = [it for layer in decoder.layers for _, _, it in latent_norms(layer)]
    norms = [
        part
        for _, part, name in _classes(decoder, family)
        if name == _norm(family) and not any(part is it for it in inside)
    ]
    activations = [it for layer in decoder.layers for it in activations_of(layer, family)]
    if other := sorted(set(activations).difference(ACTIVATIONS)):
        names = ", ".join(it.name.lower() for it in Activation)
        return f"its activation is {other[0]}; the step has {names}"
    values: dict[str, set[Any]] = {
        "epsilon": {getattr(norm, family.epsilon) for norm in norms},
        "latents' epsilon": {getattr(norm, family.epsilon) for norm in inside},
        "scaling": {attention_of(layer, family).scaling for layer in decoder.layers},
        "softcap": {softcap_of(layer, family) for layer in decoder.layers},
        "rotary size": rotary_sizes(decoder, family),
        "residual multiplier": {residual_of(layer) for layer in decoder.layers},
        "parallel residual": {is_parallel(layer, family) for layer in decoder.layers},
        "activation": {ACTIVATIONS[it].name.lower() for it in activations},
        "swiglu": {swiglu_of(layer, family) for layer in decoder.layers},
    }
    for name, each in values.items():
        if len(each) > 1:
            return f"its {name} is {' and '.join(map(str, sorted(each)))}; the step takes one"
    return None


def _other_positions(decoder: Any, family: Family) -> str | None:  # noqa: ANN401
    """Say where a decoder rotates or attends to other positions than its config has."""
    size = max(rotary_sizes(decoder, family))
    if size > rotated_of(decoder, family):
        return f"{size} numbers of each head are rotated, and it has fewer"
    if family.latent and size < rotated_of(decoder, family):
        return f"{size} of {rotated_of(decoder, family)} numbers of each head are rotated"
    for index, layer in enumerate(decoder.layers):
        attention = attention_of(layer, family)
        if not getattr(attention, "is_causal", True):
            return f"layers.{index} attends to tokens that follow"
        window = window_of(decoder, family, index)
        if (getattr(attention, "sliding_window", window) or 0) != window:
            return f"layers.{index} attends to another window than its config has"
    return None


def _norm(family: Family) -> str:
    """Return the end of the name of its norms' class."""
    return family.norm or "LayerNorm"


def _classes(decoder: Any, family: Family) -> Iterator[tuple[str, Any, str]]:  # noqa: ANN401
    """Go through the modules whose place a step takes: path, module, and the end of its class."""
    yield family.last_norm, last_norm_of(decoder, family), _norm(family)
    for i, layer in enumerate(decoder.layers):
        yield f"layers.{i}", layer, family.layer
        yield f"layers.{i}.{family.attention}", attention_of(layer, family), "Attention"
        if not is_mixture(layer, family):
            yield f"layers.{i}.mlp", layer.mlp, "MLP"
        else:
            router = router_of(layer.mlp, family)
            yield f"layers.{i}.mlp", layer.mlp, family.mixture
            yield f"layers.{i}.mlp.{family.router}", router, family.router_kind
            yield f"layers.{i}.mlp.experts", fused_of(layer.mlp), "Experts"
            if (shared := shared_of(layer.mlp, family)) is not None:
                yield f"layers.{i}.mlp.{family.shared}", shared, "MLP"
        for name, path in norms_of(layer, family).items():
            yield f"layers.{i}.{path}", norm_of(layer, family, name), _norm(family)
        for _, path, norm in latent_norms(layer):
            yield f"layers.{i}.{path}", norm, _norm(family)


def _uncut(decoder: Any, family: Family) -> str | None:  # noqa: ANN401
    """Say which packed layer holds projections that begin within a tile of its columns."""
    sizes = projection_sizes(decoder, family)
    for path, names in family.projections.items():
        if family.in_turns:  # which are parted once they are multiplied
            continue
        starts = [sum(sizes[name][0] for name in names[:i]) for i in range(len(names))]
        packed = any(isinstance(find(layer, path), NativeLinear) for layer in decoder.layers)
        if packed and (uneven := [it for it in starts if it % COLUMNS]):
            return f"{path} is cut at column {uneven[0]}; the step takes multiples of {COLUMNS}"
    return None


def _misfit(decoder: Any, family: Family) -> str | None:  # noqa: ANN401
    """Say which part of a decoder has not got the size that the others give it, or is elsewhere.

    The library reads what it is told, whatever lies there.
    """
    heads, last_norm = kv_heads_of(decoder.config, family), last_norm_of(decoder, family)
    if decoder.config.num_attention_heads % heads:
        return f"its {heads} heads of keys and values are shared unevenly"
    for name, part, shape in _parts(decoder, family):
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
        alike = not name.startswith(f"mlp.{family.router}.")  # a router may be in float32
        if isinstance(part, torch.Tensor) and alike and part.dtype != last_norm.weight.dtype:
            return f"{name} is in {part.dtype}, and its last norm in {last_norm.weight.dtype}"
        if isinstance(part, torch.Tensor) and not part.is_contiguous():
            return f"{name} is not contiguous"
    return None


def _parts(decoder: Any, family: Family) -> Iterator[tuple[str, Any, tuple[int, ...]]]:  # noqa: ANN401
    """Go through what the library reads, layers and tensors, with the shapes they must have."""
    config, last_norm = decoder.config, last_norm_of(decoder, family)
    dim, hidden = head_dim_of(decoder, family), config.hidden_size
    heads = {"q_norm": config.num_attention_heads, "k_norm": kv_heads_of(config, family)}
    yield family.last_norm, last_norm.weight, (hidden,)
    yield f"{family.last_norm}.bias", getattr(last_norm, "bias", None), (hidden,)
    for path, module, shape in _named_linears(decoder, family):
        if isinstance(module, NativeLinear):
            yield path, module, shape
        else:
            yield path, module.weight, shape
            yield path, module.bias, shape[:1]
    for layer in decoder.layers:
        yield family.sinks or "sinks", sinks_of(layer, family), (config.num_attention_heads,)
        if is_mixture(layer, family):
            router, path = router_of(layer.mlp, family), f"mlp.{family.router}"
            count = len(layer.mlp.experts.experts)
            yield f"{path}.weight", router.weight, (count, hidden)
            yield f"{path}.bias", getattr(router, "bias", None), (count,)
            yield f"{path}.correction", correction_of(layer.mlp, family), (count,)
            gate = getattr(layer.mlp, "shared_expert_gate", None)
            if gate is not None:
                yield "mlp.shared_expert_gate", gate.weight, (1, hidden)
        for name, path in norms_of(layer, family).items():
            norm, size = norm_of(layer, family, name), hidden
            if name in {"q_norm", "k_norm"}:
                size = dim * (heads[name] if family.all_heads else 1)
            yield path, norm.weight, (size,)
            yield f"{path}.bias", getattr(norm, "bias", None), (size,)
        for name, path, norm in latent_norms(layer):
            yield (
                path,
                norm.weight,
                (config.kv_lora_rank if name == "kv_norm" else config.q_lora_rank,),
            )
