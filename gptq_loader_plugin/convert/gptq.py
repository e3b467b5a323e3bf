"""GPTQ itself: zeros in the other form, old files as they are written today, or only resharded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.checkpoint.config import CONFIG_FILES, read_json
from gptq_loader_plugin.convert.layers import (
    SAFETENSORS_DTYPES,
    bias_info,
    has_bias,
    pieces_in_order,
    refusal,
)
from gptq_loader_plugin.convert.pieces import Info, Made, Piece, Planned
from gptq_loader_plugin.kernel.packing import CONTINUOUS_BITS, pack_columns, words

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.convert.options import ConvertOptions
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["plan_gptq", "plan_same"]

KEPT_FIELDS = ("damp_percent", "static_groups", "true_sequential", "lm_head", "dynamic")
ASYMMETRIC = (
    "GPTQModel refuses asymmetric zeros stored minus one that it has not written itself; it takes "
    "gptq_v2"
)
BORROWED = (
    "{count} layers have a zero of 0, which gptq stores as one less, with borrow: some readers "
    "take that for another zero; gptq_v2 has no such case"
)


def plan_same(checkpoint: Checkpoint, options: ConvertOptions) -> Planned:
    """Plan to write the tensors as they are, in safetensors files of another size."""
    from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint

    if not isinstance(checkpoint, GPTQCheckpoint):
        return plan_gptq(checkpoint, options)

    def plan_layer(layer: LayerSpec) -> Piece:
        headers = checkpoint.headers
        infos = {
            part: Info(headers[part].dtype, tuple(headers[part].shape))
            for part in checkpoint.layer_tensors(layer.name)
        }
        return Piece(
            layer.name,
            infos,
            lambda: Made({part: checkpoint.tensor(part) for part in infos}),
            kind="as it was",
        )

    return Planned(pieces_in_order(checkpoint, plan_layer), _described(checkpoint))


def plan_gptq(checkpoint: Checkpoint, options: ConvertOptions) -> Planned:
    """Plan to write GPTQ's tensors with zeros as the format has them.

    Raises:
        UnsupportedFormat: a layer has codes that the format does not know.
    """
    is_v1 = options.format != "gptq_v2"
    layers = checkpoint.layers.values()
    unknown = [
        (layer.name, f"{layer.bits} bits") for layer in layers if layer.bits not in CONTINUOUS_BITS
    ]
    error = refusal(
        checkpoint,
        unknown,
        format_name=options.format,
        hint="keep it as it is, or convert it to dense or gguf",
    )
    if error is not None:
        raise error
    biased = has_bias(checkpoint)

    def plan_layer(layer: LayerSpec) -> Piece:
        name, bits = layer.name, layer.bits
        groups, columns = layer.groups, layer.out_features

        def make() -> Made:
            import torch

            packed = checkpoint.packed(name)
            zeros = _packed_zeros(packed.zeros.numpy(), bits, is_v1=is_v1)
            tensors = {
                f"{name}.qweight": packed.words(),
                f"{name}.qzeros": torch.from_numpy(zeros),
                f"{name}.scales": packed.scales,
                f"{name}.g_idx": packed.g_idx,
            }
            if biased(name):
                tensors[f"{name}.bias"] = checkpoint.tensor(f"{name}.bias")
            return Made(tensors)

        infos = {
            f"{name}.qweight": Info("I32", (words(layer.in_features, bits), columns)),
            f"{name}.qzeros": Info("I32", (groups, words(columns, bits))),
            f"{name}.scales": Info(SAFETENSORS_DTYPES[layer.scales_dtype], (groups, columns)),
            f"{name}.g_idx": Info("I32", (layer.in_features,)),
        }
        if biased(name):
            infos |= bias_info(checkpoint, name)
        return Piece(name, infos, make, kind=f"{bits}-bit")

    named = "gptq" if is_v1 else "gptq_v2"
    described = {**_described(checkpoint), "checkpoint_format": named}
    described["quant_method"] = "gptq"
    warnings: list[str] = []
    if is_v1 and not checkpoint.config.sym and "gptqmodel" not in json.dumps(described):
        warnings.append(ASYMMETRIC)
    at_zero = sum(layer.zero_range[0] == 0 for layer in layers) if is_v1 else 0
    if at_zero:
        warnings.append(BORROWED.format(count=at_zero))
    pieces = pieces_in_order(checkpoint, plan_layer)
    return Planned(pieces, described, warnings=tuple(warnings))


def _packed_zeros(zeros: NDArray[np.uint8], bits: int, *, is_v1: bool) -> NDArray[np.int32]:
    """Pack zeros [G, N]; in v1 less one: of 3 bits each by itself, else word by word, borrowing."""
    if not is_v1:
        return np.ascontiguousarray(pack_columns(zeros, _bits(bits), "continuous"))
    if bits == 3:
        lower = (zeros - np.uint8(1)) & np.uint8(7)
        return np.ascontiguousarray(pack_columns(lower, 3, "continuous"))
    ones = sum(1 << shift for shift in range(0, 32, bits))
    stored = pack_columns(zeros, _bits(bits), "continuous").view(np.uint32) - np.uint32(ones)
    return np.ascontiguousarray(stored.view(np.int32))


def _bits(bits: int) -> Any:  # noqa: ANN401 - one of CONTINUOUS_BITS, which types do not know
    return bits


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe the quantisation as its tensors show it, with what else its config said."""
    config = checkpoint.config
    extra = {
        name: value
        for name in KEPT_FIELDS
        if (value := getattr(config, name, None)) not in (None, {})
    }
    return {
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act,
        "sym": config.sym,
        **extra,
        "quant_method": "gptq",
        "checkpoint_format": config.checkpoint_format,
        "pack_dtype": "int32",
        "model_file_base_name": "model",
        **_meta(checkpoint.folder),
    }


def _meta(folder: Path) -> dict[str, Any]:
    """Return what a config says of its writer, which GPTQModel goes by."""
    tables = [read_json(it) for name in CONFIG_FILES if (it := folder / name).is_file()]
    config = folder / "config.json"
    if config.is_file():
        tables.append(read_json(config).get("quantization_config") or {})
    meta = next((it["meta"] for it in tables if isinstance(it.get("meta"), dict)), None)
    return {} if meta is None else {"meta": meta}
