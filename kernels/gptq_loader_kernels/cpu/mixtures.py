"""The feed-forward parts of a decoder that are mixtures of experts; imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_kernels.cpu.families import find
from gptq_loader_plugin.model.experts import PackedExperts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_kernels.cpu.families import Family

__all__ = [
    "CLAMPED",
    "ROLES",
    "activations_of",
    "correction_of",
    "expert_sizes",
    "experts_of",
    "fused_of",
    "groups_of",
    "is_mixture",
    "is_normalized",
    "projections_of",
    "router_of",
    "shared_of",
    "swiglu_of",
]

ROLES = ("gate", "up", "down")
CLAMPED = "SwiGLU-OAI"


def is_mixture(layer: Any, family: Family) -> bool:  # noqa: ANN401
    """Return whether a layer's feed-forward part is a mixture: in some models, some layers' are."""
    return family.expert_size is not None and hasattr(layer.mlp, "experts")


def projections_of(layer: Any, family: Family) -> dict[str, tuple[str, ...]]:  # noqa: ANN401
    """Return a layer's linears outside of a mixture by path, and which projections are in each."""
    mixed = is_mixture(layer, family)
    return {
        path: names
        for path, names in family.projections.items()
        if not mixed or not set(names).intersection(ROLES)
        if not family.latent or find(layer, path) is not None
    }


def activations_of(layer: Any, family: Family) -> Iterator[str]:  # noqa: ANN401
    """Go through the activations of a layer's feed-forward part, by the names of their classes."""
    if not is_mixture(layer, family):
        yield type(find(layer, family.activation)).__name__
        return
    yield CLAMPED if family.clamps else type(fused_of(layer.mlp).act_fn).__name__
    if (shared := shared_of(layer.mlp, family)) is not None:
        yield type(shared.act_fn).__name__


def swiglu_of(layer: Any, family: Family) -> tuple[float, float]:  # noqa: ANN401
    """Return by what experts that clamp multiply their gates, and what they clamp to; or zeros."""
    if not family.clamps or not is_mixture(layer, family):
        return 0.0, 0.0
    fused = fused_of(layer.mlp)
    return float(fused.alpha), float(fused.limit)


def experts_of(mixture: Any, family: Family) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return each expert's linears by what they are; those that every token takes come last."""
    experts: Any = mixture.experts
    each = [dict(expert.items()) for expert in experts.experts]
    shared = shared_of(mixture, family)
    if shared is not None:
        each.append({role: getattr(shared, f"{role}_proj") for role in ROLES})
    return each


def router_of(mixture: Any, family: Family) -> Any:  # noqa: ANN401
    """Return what chooses the experts of a token."""
    return find(mixture, family.router)


def correction_of(mixture: Any, family: Family) -> Any:  # noqa: ANN401
    """Return what is added [experts] to the scores that a router chooses by, or None."""
    return find(mixture, family.correction)


def shared_of(mixture: Any, family: Family) -> Any:  # noqa: ANN401
    """Return the expert that every token takes, or None."""
    return getattr(mixture, family.shared, None)


def groups_of(router: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return how many groups of experts a router has, and of how many it takes experts."""
    if getattr(router, "topk_method", None) == "greedy":  # by DeepSeek-V2's
        return 1, 1
    return int(getattr(router, "num_group", 1) or 1), int(getattr(router, "topk_group", 1) or 1)


def is_normalized(router: Any, family: Family) -> bool:  # noqa: ANN401
    """Return whether what the experts of a token count adds up to 1."""
    return bool(getattr(router, "norm_topk_prob", not family.groups_by_best))


def expert_sizes(config: Any, family: Family) -> tuple[int, int]:  # noqa: ANN401
    """Return how wide an expert of a mixture is, and one that every token takes."""
    own = int(getattr(config, str(family.expert_size)))
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return own, int(own * getattr(config, "n_shared_experts", 1) if shared is None else shared)


def fused_of(mixture: Any) -> Any:  # noqa: ANN401
    """Return the module of transformers that packed experts stand in for, or None."""
    experts: Any = mixture.experts
    return experts.fused if type(experts) is PackedExperts else None
