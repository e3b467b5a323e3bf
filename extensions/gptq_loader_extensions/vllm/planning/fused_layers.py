"""Describe the layers that vLLM fuses a checkpoint's into: q, k and v in one, gate and up in one.

layers/linear.py does this with the tensors; here it is predicted from headers and g_idx alone, so
that a choice can be explained where vLLM is not installed. The names are those of Llama and its
relatives; for a model that vLLM fuses in another way, vLLM's log has the choices when it loads.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gptq_loader_extensions.vllm.planning.layer_names import LayerNames
from gptq_loader_plugin.checkpoint.infer import row_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["expert_layers", "fused_layers"]

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERT = re.compile(r".*\.experts\.\d+\..*")


def expert_layers(checkpoint: GPTQCheckpoint) -> list[LayerSpec]:
    """List the layers of a mixture's experts, which vLLM's kernels never see packed."""
    return [layer for layer in checkpoint.layers.values() if EXPERT.fullmatch(layer.name)]


def fused_layers(checkpoint: GPTQCheckpoint) -> tuple[LayerSpec, ...]:
    """Describe the layers as vLLM has them, for kernels to consider; without experts.

    Raises:
        UnsupportedFormat: of the layers that vLLM fuses into one, only some are quantised.
    """
    names = LayerNames(checkpoint.layers, checkpoint.path)
    done: set[str] = set()
    fused: list[LayerSpec] = []
    for name in checkpoint.layers:
        if name in done or EXPERT.fullmatch(name):
            continue
        prefix = _fused_name(name, checkpoint)
        parts = names.claim(prefix, FUSED)
        done.update(parts)
        fused += _fuse([checkpoint.layers[part] for part in parts], prefix, checkpoint)
    return tuple(fused)


def _fused_name(name: str, checkpoint: GPTQCheckpoint) -> str:
    """Return the name of vLLM's layer that a layer is part of; its own where there is none."""
    parent, _, last = name.rpartition(".")
    for fused, projections in FUSED.items():
        stored = [
            f"{parent}.{projection}.qweight" in checkpoint.headers
            or f"{parent}.{projection}.weight" in checkpoint.headers
            for projection in projections
        ]
        if last in projections and all(stored):
            return f"{parent}.{fused}"
    return name


def _fuse(layers: Sequence[LayerSpec], name: str, checkpoint: GPTQCheckpoint) -> list[LayerSpec]:
    """Fuse layers with the same groups; where they differ, leave each by itself."""
    first = layers[0]
    if len(layers) == 1:
        return [_in_order(first)]
    groups = _groups(first, checkpoint)
    same = all(
        (layer.bits, layer.layout, layer.scales_dtype, layer.groups)
        == (first.bits, first.layout, first.scales_dtype, first.groups)
        and np.array_equal(_groups(layer, checkpoint), groups)
        for layer in layers[1:]
    )
    if not same:
        return [_in_order(layer) for layer in layers]
    min_zero = min(layer.zero_range[0] for layer in layers)
    max_zero = max(layer.zero_range[1] for layer in layers)
    fused = replace(
        first,
        name=name,
        out_features=sum(layer.out_features for layer in layers),
        sym=min_zero == max_zero,
        zero_range=(min_zero, max_zero),
        bias=any(layer.bias for layer in layers),
    )
    return [_in_order(fused)]


def _in_order(layer: LayerSpec) -> LayerSpec:
    """Describe a layer of one group as one without act-order, which changes nothing there."""
    return layer if layer.groups > 1 else replace(layer, desc_act=False, group_size=-1)


def _groups(layer: LayerSpec, checkpoint: GPTQCheckpoint) -> NDArray[np.int32]:
    stored = f"{layer.name}.g_idx"
    return row_groups(
        checkpoint.tensors.integers(stored) if stored in checkpoint.headers else None,
        rows=layer.in_features,
        groups=layer.groups,
        group_size=layer.group_size,
    )
