"""Describe the layers that vLLM makes of a checkpoint's: q, k and v in one, gate and up in one.

This is what `linear.py` does with the tensors, said beforehand from headers and g_idx alone, so
that a choice can be explained where vLLM is not installed. The names are those of Llama and its
relatives; a model that vLLM joins in another way says so in vLLM's log when it is loaded.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gptq_loader_extensions.vllm.planning.names import Names
from gptq_loader_plugin.checkpoint.infer import row_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["expert_layers", "joined_layers"]

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERT = re.compile(r".*\.experts\.\d+\..*")


def expert_layers(checkpoint: GPTQCheckpoint) -> list[LayerSpec]:
    """List the layers that are an expert's of a mixture: vLLM's kernels never see them packed."""
    return [it for it in checkpoint.layers.values() if EXPERT.fullmatch(it.name)]


def joined_layers(checkpoint: GPTQCheckpoint) -> tuple[LayerSpec, ...]:
    """Describe the layers as vLLM has them, for kernels to consider; experts are left out.

    Raises:
        UnsupportedFormat: some of what vLLM joins is quantised, and some is not.
    """
    names = Names(checkpoint.layers, checkpoint.path)
    done: set[str] = set()
    described: list[LayerSpec] = []
    for name in checkpoint.layers:
        if name in done or EXPERT.fullmatch(name):
            continue
        prefix = _joined_name(name, checkpoint)
        found = names.claim(prefix, JOINED)
        done.update(found)
        described += _join([checkpoint.layers[it] for it in found], prefix, checkpoint)
    return tuple(described)


def _joined_name(name: str, checkpoint: GPTQCheckpoint) -> str:
    """Name vLLM's layer that a layer is part of; its own name where there is no such layer."""
    parent, _, last = name.rpartition(".")
    for joined, parts in JOINED.items():
        whole = [f"{parent}.{it}" for it in parts]
        there = [
            f"{it}.qweight" in checkpoint.headers or f"{it}.weight" in checkpoint.headers
            for it in whole
        ]
        if last in parts and all(there):
            return f"{parent}.{joined}"
    return name


def _join(layers: Sequence[LayerSpec], name: str, checkpoint: GPTQCheckpoint) -> list[LayerSpec]:
    """Join layers with the same groups; where they differ, each stays by itself."""
    first = layers[0]
    if len(layers) == 1:
        return [_as_vllm(first)]
    groups = _groups(first, checkpoint)
    same = all(
        (it.bits, it.layout, it.scales_dtype, it.groups)
        == (first.bits, first.layout, first.scales_dtype, first.groups)
        and np.array_equal(_groups(it, checkpoint), groups)
        for it in layers[1:]
    )
    if not same:
        return [_as_vllm(it) for it in layers]
    least = min(it.zero_range[0] for it in layers)
    most = max(it.zero_range[1] for it in layers)
    whole = replace(
        first,
        name=name,
        out_features=sum(it.out_features for it in layers),
        sym=least == most,
        zero_range=(least, most),
        bias=any(it.bias for it in layers),
    )
    return [_as_vllm(whole)]


def _as_vllm(layer: LayerSpec) -> LayerSpec:
    """Say of one group what is so: the order of its rows changes nothing."""
    return layer if layer.groups > 1 else replace(layer, desc_act=False, group_size=-1)


def _groups(layer: LayerSpec, checkpoint: GPTQCheckpoint) -> NDArray[np.int32]:
    stored = f"{layer.name}.g_idx"
    return row_groups(
        checkpoint.tensors.integers(stored) if stored in checkpoint.headers else None,
        rows=layer.in_features,
        groups=layer.groups,
        group_size=layer.group_size,
    )
