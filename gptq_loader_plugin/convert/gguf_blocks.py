"""A layer as blocks of GGUF: Q4_0 and Q8_0 keep codes as they are where they can.

A block is 32 inputs of one output: a float16 scale d, then 32 codes, and a weight is d * code.
Q4_0's codes are -8 to 7 and Q8_0's -128 to 127, so a GPTQ layer fits exactly where the rows of a
block share a scale and every code minus its zero is in range: 2 and 3 bits and symmetric 4 bits in
Q4_0; asymmetric 4 bits, and symmetric 5 to 8 bits, in Q8_0. The rest is requantised to Q8_0, whose
step is about an eighteenth of a 4-bit one's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptq_loader_plugin.convert.layers import code_range, in_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = ["BLOCK", "BlockType", "block_type", "blocks", "blocks_error"]

BLOCK = 32
FLOAT16_MAX = 65504.0


class BlockType(NamedTuple):
    """How a layer is stored.

    Attributes:
        name: as GGUF names it.
        row_bytes: the bytes of an output.
        keeps_codes: whether codes stay as they are.
        note: why not, or "".
    """

    name: str
    row_bytes: int
    keeps_codes: bool
    note: str = ""


def block_type(layer: LayerSpec) -> BlockType:
    """Choose a layer's type from its headers."""
    rows = layer.in_features
    if rows % BLOCK:
        return BlockType("F16", rows * 2, keeps_codes=False, note=f"{rows} inputs: no whole blocks")
    eight = rows // BLOCK * (2 + BLOCK)
    lowest, highest = code_range(layer)
    if not in_order(layer, BLOCK):
        why = "act-order" if layer.desc_act else f"groups of {layer.group_size}"
        why += ": rows of a block differ in scale, so it is requantised to 8 bits"
        return BlockType("Q8_0", eight, keeps_codes=False, note=why)
    if lowest >= -8 and highest <= 7:
        return BlockType("Q4_0", rows // BLOCK * (2 + BLOCK // 2), keeps_codes=True)
    if lowest >= -128 and highest <= 127:
        return BlockType("Q8_0", eight, keeps_codes=True)
    why = "asymmetric codes of 8 bits reach beyond Q8_0's, so it is requantised"
    return BlockType("Q8_0", eight, keeps_codes=False, note=why)


def blocks(packed: PackedLinear, kind: BlockType) -> NDArray[np.uint8]:
    """Make a layer's blocks, uint8 [N, row_bytes].

    Raises:
        OverflowError: a scale, or a weight, is beyond float16.
    """
    import torch

    if not kind.keeps_codes:
        return _requantised(packed, kind)
    g_idx = packed.g_idx.long()
    scales = packed.scales.float()
    if float(scales.abs().max()) > FLOAT16_MAX:
        raise OverflowError("a scale is beyond float16")
    codes = packed.codes().to(torch.int16) - packed.zeros.to(torch.int16)[g_idx]
    first_rows = scales.half()[g_idx[::BLOCK]]  # [K / 32, N]
    d = first_rows.t().contiguous().numpy()
    whole: Any = codes.t().contiguous().numpy().reshape(len(d), -1, BLOCK)  # [N, K / 32, 32]
    if kind.name == "Q4_0":
        raised = (whole + 8).astype(np.uint8)
        values = raised[..., : BLOCK // 2] | raised[..., BLOCK // 2 :] << 4
    else:
        values = whole.astype(np.int8).view(np.uint8)
    joined = np.concatenate([d[..., None].view(np.uint8), values], axis=-1)
    return joined.reshape(len(d), kind.row_bytes)


def blocks_error(packed: PackedLinear, made: NDArray[np.uint8], kind: BlockType) -> float:
    """Return how far blocks are from the layer, read back by the gguf package."""
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from gptq_loader_plugin.convert.layers import relative_error

    stored = made.view(np.float16) if kind.name == "F16" else made
    values = dequantize(stored, GGMLQuantizationType[kind.name])
    return relative_error(packed, torch.from_numpy(np.ascontiguousarray(values, np.float32)))


def _requantised(packed: PackedLinear, kind: BlockType) -> NDArray[np.uint8]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    weight = packed.dequantize().numpy()
    if float(np.abs(weight).max()) > FLOAT16_MAX:
        raise OverflowError("a weight is beyond float16")
    if kind.name == "F16":
        return weight.astype(np.float16).view(np.uint8)
    made: NDArray[np.uint8] = quantize(weight, GGMLQuantizationType[kind.name])
    return made
