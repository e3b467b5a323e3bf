"""AWQ as AutoAWQ's GEMM kernels read it: 4-bit codes and zeros along the outputs, interleaved.

    qweight  int32 [K, N / 8]
    qzeros   int32 [G, N / 8]
    scales   float16 [G, N]

Eight outputs make a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.convert.layers import (
    bias_info,
    code_range,
    has_bias,
    in_order,
    left_linears,
    pieces_in_order,
    refusal,
    relative_error,
)
from gptq_loader_plugin.convert.pieces import Info, Made, Piece, Planned

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.convert.options import ConvertOptions
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["plan_awq"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
HINT = (
    "convert it to compressed-tensors, which has 8 bits, or to gguf, which requantises what is in "
    "act-order to 8 bits"
)


def plan_awq(checkpoint: Checkpoint, options: ConvertOptions) -> Planned:  # noqa: ARG001 - as every planner
    """Plan to repack 4-bit codes; 2- and 3-bit ones are the same values of 4 bits.

    Raises:
        UnsupportedFormat: a layer is no 4-bit layer in order, and would lose twice.
    """
    layers = list(checkpoint.layers.values())
    sizes = {layer.group_size if layer.groups > 1 else -1 for layer in layers}
    refused = [(layer.name, why) for layer in layers if (why := _refused(layer))]
    if not refused and len(sizes) > 1:
        refused = [(layers[0].name, "groups of several sizes")]
    error = refusal(checkpoint, refused, format_name="AWQ", hint=HINT)
    if error is not None:
        raise error
    biased = has_bias(checkpoint)

    def plan_layer(layer: LayerSpec) -> Piece:
        name = layer.name

        def make() -> Made:
            import torch

            packed = checkpoint.packed(name)
            scales = packed.scales.half()
            error = 0.0
            if not torch.equal(scales.float(), packed.scales.float()):
                rounded = type(packed)(
                    qweight=packed.qweight, zeros=packed.zeros, scales=scales, g_idx=packed.g_idx,
                    bits=packed.bits, layout=packed.layout,
                )  # fmt: skip
                error = relative_error(packed, rounded.dequantize())
            tensors = {
                f"{name}.qweight": _interleaved(packed.codes()),
                f"{name}.qzeros": _interleaved(packed.zeros),
                f"{name}.scales": scales,
            }
            if biased(name):
                tensors[f"{name}.bias"] = checkpoint.tensor(f"{name}.bias")
            return Made(tensors, error)

        columns = layer.out_features
        infos = {
            f"{name}.qweight": Info("I32", (layer.in_features, columns // 8)),
            f"{name}.qzeros": Info("I32", (layer.groups, columns // 8)),
            f"{name}.scales": Info("F16", (layer.groups, columns)),
        }
        if biased(name):
            infos |= bias_info(checkpoint, name)
        return Piece(name, infos, make, kind="AWQ 4-bit", note="scales rounded to float16")

    quantization = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": sizes.pop(),
        "zero_point": True,
        "modules_to_not_convert": left_linears(checkpoint) or None,
    }
    return Planned(pieces_in_order(checkpoint, plan_layer), quantization, dtype="float16")


def _refused(layer: LayerSpec) -> str:
    if not in_order(layer):
        return "act-order with groups, and AWQ has no g_idx"
    if not layer.even_groups:
        return "its last group is short"
    if layer.bits > 4:
        return f"{layer.bits} bits, and AWQ has 4"
    if layer.zero_range[1] > 15 or code_range(layer)[1] > 15:
        return f"a zero of {layer.zero_range[1]}, and AWQ's end at 15"
    if layer.out_features % 8:
        return f"{layer.out_features} outputs, and AWQ packs eight to a word"
    return ""


def _interleaved(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 [rows, N] into int32 [rows, N / 8]."""
    import torch

    eights = codes.view(len(codes), -1, 8).to(torch.int32)
    packed = torch.zeros(eights.shape[:2], dtype=torch.int32)
    for place, column in enumerate(ORDER):
        packed |= eights[:, :, column] << (4 * place)
    return packed
