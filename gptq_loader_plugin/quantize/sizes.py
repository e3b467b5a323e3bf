"""Forecast how large a checkpoint will be, from a model's config.json alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import QuantizeError
from gptq_loader_plugin.model.linears import linear_shape
from gptq_loader_plugin.quantize.blocks import find_blocks, linears, separate_experts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["PERMUTATIONS", "Size", "forecast_sizes", "layer_bytes"]

# The branches that publishers of 2023 made: bits, and rows of a group.
PERMUTATIONS = ((4, -1), (4, 32), (4, 64), (4, 128), (3, -1), (3, 128), (8, -1), (8, 128))
HALF = 2  # bytes of a scale, and of what is not quantised


@dataclass(frozen=True, slots=True)
class Size:
    """How large a checkpoint will be.

    Attributes:
        bits: the width of a code.
        group_size: rows that share a scale, or -1.
        size_bytes: its weight files together, headers left out.
    """

    bits: int
    group_size: int
    size_bytes: int


def forecast_sizes(
    folder: Path, permutations: Sequence[tuple[int, int]] = PERMUTATIONS
) -> list[Size]:
    """Count what a model's checkpoints would take, each with its g_idx.

    Args:
        folder: where its config.json is; weights are not looked at.
        permutations: bits and group size of each.

    Raises:
        QuantizeError: config.json is no model's that transformers has.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise QuantizeError(
            f"no model can be made of {folder}/config.json ({str(error).splitlines()[0][:200]})",
            hint="name the folder of a model that transformers can load",
        ) from error
    separate_experts(model)
    shapes = [
        shape
        for block in find_blocks(model)
        for module in linears(block).values()
        if (shape := linear_shape(module)) is not None
    ]
    packed = sum(rows * columns for rows, columns in shapes)
    rest = HALF * (sum(it.numel() for it in model.parameters()) - packed)
    return [
        Size(bits, group, rest + sum(layer_bytes(*shape, bits, group) for shape in shapes))
        for bits, group in permutations
    ]


def layer_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Count what a layer's codes, zeros, scales and g_idx take in a file."""
    groups = 1 if group_size < 0 else math.ceil(rows / group_size)
    codes = math.ceil(rows * bits / 32) * 4 * columns
    zeros = groups * math.ceil(columns * bits / 32) * 4
    return codes + zeros + groups * columns * HALF + 4 * rows
