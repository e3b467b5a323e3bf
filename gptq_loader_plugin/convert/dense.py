"""Dense weights: each layer computed in float32 and rounded once, as if it were not quantised."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from gptq_loader_plugin.convert.layers import (
    SAFETENSORS_DTYPES,
    has_bias,
    pieces_in_order,
    relative_error,
)
from gptq_loader_plugin.convert.pieces import Info, Made, Piece, Planned

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.convert.options import ConvertOptions
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["plan_dense"]

TRANSPOSED = ("gpt2", "openai-gpt")  # their linears are transformers' Conv1D


def plan_dense(checkpoint: Checkpoint, options: ConvertOptions) -> Planned:
    """Plan to write every layer as a plain weight."""
    import torch

    halves = Counter(layer.half_dtype for layer in checkpoint.layers.values())
    dtype_name = options.dtype or halves.most_common(1)[0][0]
    dtype: torch.dtype = getattr(torch, dtype_name)
    stored = SAFETENSORS_DTYPES[dtype_name]
    biased = has_bias(checkpoint)
    is_transposed = checkpoint.model_config["model_type"] in TRANSPOSED
    floats = tuple(SAFETENSORS_DTYPES.values())

    def plan_layer(layer: LayerSpec) -> Piece:
        name = layer.name

        def make() -> Made:
            packed = checkpoint.packed(name)
            weight = packed.dequantize(dtype)
            error = 0.0 if dtype_name == "float32" else relative_error(packed, weight.float())
            tensors = {f"{name}.weight": weight.t() if is_transposed else weight}
            if biased(name):
                tensors[f"{name}.bias"] = checkpoint.tensor(f"{name}.bias").to(dtype)
            return Made(tensors, error)

        shape = (layer.out_features, layer.in_features)
        infos = {f"{name}.weight": Info(stored, shape[::-1] if is_transposed else shape)}
        if biased(name):
            infos[f"{name}.bias"] = Info(stored, (layer.out_features,))
        return Piece(name, infos, make, kind=dtype_name, note=f"rounded once to {dtype_name}")

    def plan_tensor(checkpoint: Checkpoint, name: str) -> Piece:
        info = checkpoint.headers[name]
        is_float = info.dtype in floats
        return Piece(
            name,
            {name: Info(stored if is_float else info.dtype, tuple(info.shape))},
            lambda: Made(
                {name: checkpoint.tensor(name).to(dtype) if is_float else checkpoint.tensor(name)}
            ),
        )

    return Planned(pieces_in_order(checkpoint, plan_layer, plan_tensor), None, dtype=dtype_name)
