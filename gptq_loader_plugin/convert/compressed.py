"""compressed-tensors' pack-quantized, which vLLM reads: codes along the inputs, 4 or 8 bits.

    weight_packed      int32 [N, K * bits / 32]
    weight_scale       float [N, G]
    weight_zero_point  int32 [N * bits / 32, G], where zeros differ
    weight_shape       int64 [2]

A code is stored above the middle of its range: 8 is nothing in 4 bits. 2 and 3 bits are written as
4, and 5 to 7 as 8: the versions of compressed-tensors do not agree on how 3 bits lie in words, and
vLLM has kernels for 4 and 8 alone. Act-order with groups was given up in August 2026, with the
g_idx it needs: vLLM 0.32 and compressed-tensors 0.20 refuse such files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from gptq_loader_plugin.convert.layers import (
    SAFETENSORS_DTYPES,
    bias_info,
    code_range,
    has_bias,
    in_order,
    left_linears,
    pieces_in_order,
    refusal,
)
from gptq_loader_plugin.convert.pieces import Info, Made, Piece, Planned
from gptq_loader_plugin.kernel.packing import pack_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.convert.options import ConvertOptions
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["plan_compressed"]


WIDER = (
    "{count} layers are written with wider codes, of the same values: vLLM has kernels for 4 and 8 "
    "bits alone"
)


class Scheme(NamedTuple):
    """What layers of one kind have in common: a `config_group` of theirs."""

    bits: int
    sym: bool
    group_size: int


def plan_compressed(checkpoint: Checkpoint, options: ConvertOptions) -> Planned:  # noqa: ARG001 - as every planner
    """Plan to repack every layer, exactly.

    Raises:
        UnsupportedFormat: a layer is in act-order with groups, its last group is short, or its
            widths fill no whole words.
    """
    layers = list(checkpoint.layers.values())
    error = refusal(
        checkpoint,
        [(layer.name, why) for layer in layers if (why := _refused(layer))],
        format_name="compressed-tensors",
        hint="convert it to gguf, which requantises such layers to 8 bits, or to dense",
    )
    if error is not None:
        raise error
    biased = has_bias(checkpoint)

    def plan_layer(layer: LayerSpec) -> Piece:
        scheme = _scheme(layer)
        infos = _infos(layer, scheme)
        if biased(layer.name):
            infos |= bias_info(checkpoint, layer.name)
        kind = f"{scheme.bits}-bit {'sym' if scheme.sym else 'asym'}"
        return Piece(layer.name, infos, lambda: _made(checkpoint, layer, infos), kind=kind)

    wider = sum(_scheme(layer).bits != layer.bits for layer in layers)
    warnings: tuple[str, ...] = ()
    if wider:
        warnings = (WIDER.format(count=wider),)
    quantization = _described(checkpoint, layers)
    return Planned(pieces_in_order(checkpoint, plan_layer), quantization, warnings=warnings)


def _refused(layer: LayerSpec) -> str:
    scheme = _scheme(layer)
    if not in_order(layer):
        return "act-order with groups, which its readers have given up"
    if not layer.even_groups:
        return "its last group is short"
    if layer.zero_range[1] >= 1 << scheme.bits:
        return f"a zero of {layer.zero_range[1]}"
    if layer.in_features % 32:
        return f"{layer.in_features} inputs, which are no multiple of 32"
    if not scheme.sym and layer.out_features * scheme.bits % 32:
        return f"{layer.out_features} outputs, whose zeros fill no whole words"
    return ""


def _scheme(layer: LayerSpec) -> Scheme:
    lowest, highest = code_range(layer)
    bits = 4 if layer.bits <= 4 else 8
    middle = 1 << (bits - 1)
    return Scheme(
        bits=bits,
        sym=-middle <= lowest and highest < middle,
        group_size=layer.group_size if layer.groups > 1 else -1,
    )


def _infos(layer: LayerSpec, scheme: Scheme) -> dict[str, Info]:
    """Describe a layer's tensors."""
    name, bits = layer.name, scheme.bits
    rows, columns = layer.in_features, layer.out_features
    scales = SAFETENSORS_DTYPES[layer.scales_dtype]
    infos = {
        f"{name}.weight_packed": Info("I32", (columns, rows * bits // 32)),
        f"{name}.weight_scale": Info(scales, (columns, layer.groups)),
        f"{name}.weight_shape": Info("I64", (2,)),
    }
    if not scheme.sym:
        infos[f"{name}.weight_zero_point"] = Info("I32", (columns * bits // 32, layer.groups))
    return infos


def _made(checkpoint: Checkpoint, layer: LayerSpec, infos: Mapping[str, Info]) -> Made:
    """Read a layer and repack it."""
    import torch

    name, scheme = layer.name, _scheme(layer)
    packed = checkpoint.packed(name)
    codes, zeros = packed.codes(), packed.zeros
    if scheme.sym:  # codes become differences from their zeros, above the middle
        differences = codes.to(torch.int16) - zeros.to(torch.int16)[packed.g_idx]
        codes = (differences + (1 << (scheme.bits - 1))).to(torch.uint8)
    tensors = {
        f"{name}.weight_packed": _packed(codes, scheme.bits).t(),
        f"{name}.weight_scale": packed.scales.t(),
        f"{name}.weight_shape": torch.tensor([layer.out_features, layer.in_features]),
        # [G, N] down the outputs: [N * bits / 32, G]
        f"{name}.weight_zero_point": _packed(zeros.t().contiguous(), scheme.bits),
    }
    if f"{name}.bias" in infos:
        tensors[f"{name}.bias"] = checkpoint.tensor(f"{name}.bias")
    return Made({tensor: tensors[tensor] for tensor in infos})


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 [rows, columns] down the rows into int32 [rows * bits / 32, columns]."""
    import torch

    return torch.from_numpy(pack_rows(codes.numpy(), _bits(bits), "continuous"))


def _bits(bits: int) -> Any:  # noqa: ANN401 - 4 or 8, which types do not know
    return bits


def _described(checkpoint: Checkpoint, layers: list[LayerSpec]) -> dict[str, Any]:
    schemes: dict[Scheme, list[str]] = defaultdict(list)
    for layer in layers:
        schemes[_scheme(layer)].append(layer.name)
    groups = {}
    for number, (scheme, names) in enumerate(schemes.items()):
        targets = ["Linear"] if len(schemes) == 1 else [f"re:^{re.escape(it)}$" for it in names]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.sym,
                "strategy": "group" if scheme.group_size > 0 else "channel",
                "group_size": scheme.group_size if scheme.group_size > 0 else None,
                "actorder": None,
                "dynamic": False,
                "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*left_linears(checkpoint), "lm_head"} - {*checkpoint.layers}),
        "kv_cache_scheme": None,
    }
