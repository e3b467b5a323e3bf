"""What every format needs to know of a checkpoint's layers, from headers alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gptq_loader_plugin.convert.pieces import Info, copied
from gptq_loader_plugin.errors import GPTQLoaderError, UnsupportedFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.convert.pieces import Piece
    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = [
    "SAFETENSORS_DTYPES",
    "bias_info",
    "code_range",
    "has_bias",
    "in_order",
    "left_linears",
    "pieces_in_order",
    "refusal",
    "relative_error",
]

SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
NO_LINEAR = re.compile(r"embed|norm|wte|wpe|(^|\.)ln_|layernorm|conv1d|\.gate\.weight$")


def code_range(layer: LayerSpec) -> tuple[int, int]:
    """Return the least and the greatest value of code minus zero that a layer may have."""
    return -layer.zero_range[1], (1 << layer.bits) - 1 - layer.zero_range[0]


def in_order(layer: LayerSpec, multiple: int = 1) -> bool:
    """Whether rows are in the order of their groups, each a multiple of that many rows."""
    if layer.in_features % multiple:
        return False
    return layer.groups == 1 or (not layer.desc_act and layer.group_unit % multiple == 0)


def has_bias(checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Return which layers have a bias that counts.

    AutoGPTQ of 2023 wrote one of zeros for every layer; where all have one and all are zeros, the
    model has none.
    """
    names = [name for name in checkpoint.layers if f"{name}.bias" in checkpoint.headers]
    if len(names) == len(checkpoint.layers):
        names = [name for name in names if bool(checkpoint.tensor(f"{name}.bias").any())] and names
    return frozenset(names).__contains__


def bias_info(checkpoint: Checkpoint, name: str) -> dict[str, Info]:
    """Describe a layer's bias as it is stored."""
    info = checkpoint.headers[f"{name}.bias"]
    return {f"{name}.bias": Info(info.dtype, tuple(info.shape))}


def left_linears(checkpoint: Checkpoint) -> list[str]:
    """Name the linears that are not quantised, by their weights: two dimensions, no embedding."""
    return [
        name.removesuffix(".weight")
        for name, info in checkpoint.headers.items()
        if name.endswith(".weight") and len(info.shape) == 2 and not NO_LINEAR.search(name)
    ]


def pieces_in_order(
    checkpoint: Checkpoint,
    plan_layer: Callable[[LayerSpec], Piece],
    plan_tensor: Callable[[Checkpoint, str], Piece | None] = copied,
) -> list[Piece]:
    """Plan every layer and every other tensor, in the order of the checkpoint's files."""
    owner = {part: name for name in checkpoint.layers for part in checkpoint.layer_tensors(name)}
    pieces: dict[str, Piece | None] = {}
    for tensor in checkpoint.headers:
        name = owner.get(tensor)
        if name is None:
            pieces[tensor] = plan_tensor(checkpoint, tensor)
        elif name not in pieces:
            pieces[name] = plan_layer(checkpoint.layers[name])
    return [piece for piece in pieces.values() if piece is not None]


def refusal(
    checkpoint: Checkpoint, refused: Iterable[tuple[str, str]], *, format_name: str, hint: str
) -> GPTQLoaderError | None:
    """Return the error for layers that a format cannot hold, None where there are none.

    Args:
        checkpoint: the checkpoint.
        refused: each such layer and why.
        format_name: the format.
        hint: what to do instead.
    """
    layers = list(refused)
    if not layers:
        return None
    name, why = layers[0]
    of = f"{len(layers)} of {len(checkpoint.layers)} layers"
    return UnsupportedFormat(
        f"{format_name} cannot hold {of}: {name}: {why}", path=checkpoint.path, hint=hint
    )


def relative_error(packed: PackedLinear, written: torch.Tensor) -> float:
    """Return how far a weight [N, K] in float32 is from the layer's, relative to that."""
    import torch

    weight = packed.dequantize()
    if torch.equal(weight, written):
        return 0.0
    return float((written - weight).norm() / weight.norm().clamp_min(1e-30))
