"""Describe a decoder to the native library, as it stands; imports torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_kernels.cpu.families import Family, family_of, find
from gptq_loader_kernels.cpu.fitting import ACTIVATIONS, linears, modules_inside, why_not
from gptq_loader_kernels.cpu.latents import LATENT_NORMS, latent_norms, parted, written_to
from gptq_loader_kernels.cpu.library import (
    COLUMNS,
    Activations,
    DecoderLayer,
    Expert,
    Isa,
    Latent,
    Linear,
    Mixture,
    Model,
    Norm,
    Projection,
    unit_words,
)
from gptq_loader_kernels.cpu.linear import TYPES, NativeLinear
from gptq_loader_kernels.cpu.mixtures import (
    ROLES,
    activations_of,
    correction_of,
    experts_of,
    groups_of,
    is_mixture,
    is_normalized,
    projections_of,
    router_of,
    swiglu_of,
)
from gptq_loader_kernels.cpu.parts import (
    angle_tables,
    attention_of,
    head_dim_of,
    is_parallel,
    kv_heads_of,
    last_norm_of,
    neighbours_of,
    norm_of,
    norms_of,
    projection_sizes,
    residual_of,
    rotary_sizes,
    sinks_of,
    softcap_of,
    table_of,
    window_of,
)
from gptq_loader_plugin.model.watch import CountedModule, Watch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Described", "all_packed", "describe"]


@dataclass(frozen=True, slots=True)
class Described:
    """A decoder as the library reads it.

    Attributes:
        model: the description, which points into the decoder's tensors.
        dtype: of its activations.
        tables: the types of layers that are rotated by angles of their own, or ().
        kept: what the description points to: the decoder's own tensors, of which nothing is copied
            but what makes keys and values of latents.
        watch: tells whether the decoder has been changed since.
    """

    model: Model
    dtype: torch.dtype
    tables: tuple[str, ...]
    kept: list[Any]
    watch: Watch


def describe(
    decoder: Any,  # noqa: ANN401
    dtype: torch.dtype,
    isa: Isa,
    activations: Activations,
) -> Described | None:
    """Describe a decoder for activations of `dtype`; None where the library cannot run it."""
    family = family_of(decoder)
    if family is None or why_not(decoder) is not None:
        return None
    last_norm = last_norm_of(decoder, family)
    if last_norm.weight.dtype != dtype and not all_packed(decoder, family):
        return None
    kept: list[Any] = []
    tables = angle_tables(decoder, family)
    sizes = projection_sizes(decoder, family)
    described = (DecoderLayer * len(decoder.layers))()
    for index, (place, layer) in enumerate(zip(described, decoder.layers, strict=True)):
        _describe_projections(place, layer, family, sizes, kept)
        for name in norms_of(layer, family):
            _describe_norm(getattr(place, name), norm_of(layer, family, name), kept)
        if is_mixture(layer, family):
            place.mixture = ctypes.pointer(_describe_mixture(layer.mlp, family, kept))
        if family.latent:
            weights = parted(decoder, layer, dtype, isa)
            place.latent = ctypes.pointer(_describe_latent(layer, weights, kept))
            beside = find(layer, "self_attn.q_a_proj") or find(layer, "self_attn.q_proj")
            place.k.same_rows = _same_rows(beside, layer.self_attn.kv_a_proj_with_mqa)
        if (sinks := sinks_of(layer, family)) is not None:
            place.sinks = sinks.data_ptr()
            kept.append(sinks)
        place.window = window_of(decoder, family, index)
        place.angles = table_of(decoder, family, index)
    config, first = decoder.config, decoder.layers[0]
    alpha, limit = swiglu_of(first, family)
    model = Model(
        layers=len(described),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=kv_heads_of(config, family),
        head_dim=head_dim_of(decoder, family),
        type=TYPES[dtype],
        isa=isa,
        activations=activations,
        parameter_type=TYPES[last_norm.weight.dtype],
        eps=getattr(last_norm, family.epsilon),
        scale=attention_of(first, family).scaling,
        layer=ctypes.cast(described, ctypes.POINTER(DecoderLayer)),
        norm_kind=family.norm_kind,
        activation=ACTIVATIONS[next(activations_of(first, family))],
        rotary_dim=max(rotary_sizes(decoder, family)),
        softcap=softcap_of(first, family),
        neighbours=neighbours_of(decoder, family),
        all_heads=family.all_heads,
        parallel=is_parallel(first, family),
        residual=residual_of(first),
        swiglu_alpha=alpha,
        swiglu_limit=limit,
    )
    if family.latent:
        model.latent_dim, model.value_dim = config.kv_lora_rank, config.v_head_dim
        model.plain_dim = config.qk_nope_head_dim
        model.latent_eps = getattr(find(first, LATENT_NORMS["kv_norm"]), family.epsilon)
    _describe_norm(model.norm, last_norm, kept)
    kept.append(described)
    modules = list(modules_inside(decoder, family))
    counted = [it for it in modules if isinstance(it, CountedModule)]
    inside = [it for it in modules if not isinstance(it, CountedModule)]
    watch = Watch(decoder, inside, counted, copied=written_to(decoder, family))
    return Described(model, dtype, tables, kept, watch)


def all_packed(decoder: Any, family: Family) -> bool:  # noqa: ANN401
    """Say whether every layer of a decoder is packed."""
    return all(isinstance(it, NativeLinear) for it in linears(decoder, family))


def _describe_projections(
    place: DecoderLayer,
    layer: nn.Module,
    family: Family,
    sizes: dict[str, tuple[int, int]],
    kept: list[Any],
) -> None:
    before: Any = None
    for path, names in projections_of(layer, family).items():
        module, first = layer.get_submodule(path), 0
        if family.in_turns and len(names) > 1:
            columns = sum(sizes[name][0] for name in names)
            _describe_projection(getattr(place, names[0]), module, 0, columns, kept)
            continue
        for name in names:
            if name in {"q_a", "kv_b"}:  # of latent attention
                continue
            projection, columns = getattr(place, name), sizes[name][0]
            _describe_projection(projection, module, first, columns, kept)
            projection.same_rows = name in {"k", "v", "up"} and _same_rows(before, module)
            before, first = module, first + columns


def _describe_mixture(mixture: Any, family: Family, kept: list[Any]) -> Mixture:  # noqa: ANN401
    each = experts_of(mixture, family)
    experts = (Expert * len(each))()
    for place, linears_ in zip(experts, each, strict=True):
        for role in ROLES:
            module = linears_[role]
            _describe_projection(getattr(place, role), module, 0, module.out_features, kept)
        place.up.same_rows = _same_rows(linears_["gate"], linears_["up"])
    router, shared_gate = router_of(mixture, family), getattr(mixture, "shared_expert_gate", None)
    tensors = [
        router.weight,
        getattr(router, "bias", None),
        correction_of(mixture, family),
        None if shared_gate is None else shared_gate.weight,
    ]
    groups, kept_groups = groups_of(router)
    described = Mixture(
        ctypes.cast(experts, ctypes.POINTER(Expert)),
        *(None if it is None else it.data_ptr() for it in tensors),
        experts=len(mixture.experts.experts),
        top_k=router.top_k,
        router_type=TYPES[router.weight.dtype],
        shared=len(each) > len(mixture.experts.experts),
        sigmoid=family.sigmoid,
        normalized=is_normalized(router, family),
        groups=groups,
        kept_groups=kept_groups,
        scaling=getattr(router, "routed_scaling_factor", 1.0),
        ranks_groups=1 if family.groups_by_best else 2,
    )
    kept += experts, tensors, described
    return described


def _describe_latent(
    layer: Any,  # noqa: ANN401
    weights: tuple[torch.Tensor, torch.Tensor],
    kept: list[Any],
) -> Latent:
    described, before = Latent(), find(layer, "self_attn.q_a_proj")
    described.to_keys, described.to_values = (it.data_ptr() for it in weights)
    if before is not None:
        _describe_projection(described.q_a, before, 0, before.out_features, kept)
    for name, _, norm in latent_norms(layer):
        _describe_norm(getattr(described, name), norm, kept)
    kept += weights, described
    return described


def _describe_norm(to: Norm, module: Any, kept: list[Any]) -> None:  # noqa: ANN401
    bias = getattr(module, "bias", None)
    kept += module.weight, bias
    to.weight = module.weight.data_ptr()
    if bias is not None:
        to.bias = bias.data_ptr()


def _describe_projection(
    to: Projection,
    module: Any,  # noqa: ANN401 - a linear of either kind
    first: int,
    columns: int,
    kept: list[Any],
) -> None:
    """Describe some columns of a linear, from `first` on."""
    to.in_features, to.out_features = module.in_features, columns
    if isinstance(module, NativeLinear):
        filled = _cut(module.filled(), first, columns)
        kept += module, filled, [it.detach() for it in module.buffers()]
        to.packed = ctypes.pointer(filled)
        return
    weight, bias = module.weight[first : first + columns], module.bias
    kept += weight, bias
    to.weight = weight.data_ptr()
    if bias is not None:
        to.bias = bias[first:].data_ptr()


def _cut(linear: Linear, first: int, columns: int) -> Linear:
    """Return some columns of a packed linear as one of their own, which points into the same."""
    cut, tile = Linear.from_buffer_copy(linear), first // COLUMNS
    table, scale = tile * COLUMNS * linear.groups, 4 if linear.float_scales else 2
    cut.out_features = columns
    cut.words += tile * COLUMNS * linear.units * unit_words(linear.bits) * 4
    cut.scales += table * scale
    cut.zeros += table
    if linear.bias:
        cut.bias += first * 4
    return cut


def _same_rows(one: Any, other: Any) -> bool:  # noqa: ANN401 - modules of either kind
    """Return whether two layers read x alike, so that it is permuted once for both."""
    if not isinstance(one, NativeLinear) or not isinstance(other, NativeLinear):
        return type(one) is type(other)
    names = ("rows", "segment_units")
    return one.bits == other.bits and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in names
    )
