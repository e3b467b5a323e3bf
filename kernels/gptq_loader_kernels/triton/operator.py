"""The product as an operator of torch, so that torch.compile traces through it; imports triton.

From the shapes alone it chooses one of three ways: decode inside the matmul, by tensor cores or
without them; or, from `crossover` rows of x on, dequantise the weight and let torch multiply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from triton import JITFunction

from gptq_loader_kernels.triton import fma, matmul
from gptq_loader_kernels.triton.shape import STEP, unit_rows
from gptq_loader_kernels.triton.tiles import (
    BUCKETS,
    ROW_BUCKETS,
    Tile,
    bucket,
    fit,
    fit_units,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["add_parts", "multiply_packed"]

FIELDS = 6  # of a Tile
# The bits of an exponent under which a code is the low part of a float's mantissa: 1024 + code in
# float16, 128 + code in bfloat16; in both halves of a word.
EXPONENTS = {torch.float16: 0x64006400, torch.bfloat16: 0x43004300}
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SCALES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}
ADDED = 256  # elements of y that one program adds the parts of
ALIGNED = 16  # bytes, as Triton specialises for, and torch allocates
DEQUANTIZED = 128  # columns that one program dequantises, of a unit of rows


@torch.library.custom_op(
    "gptq_loader::multiply_packed",
    mutates_args=(),
    schema="(Tensor x, Tensor words, Tensor table, Tensor? bias, int bits, int out_features, "
    "int group_shift, str scales, int[] tiles, int multiprocessors, bool tensor_cores, "
    "int crossover, ScalarType dtype) -> Tensor",
)
def multiply_packed(  # noqa: PLR0913, PLR0917 - an operator's arguments
    x: torch.Tensor,
    words: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    out_features: int,
    group_shift: int,
    scales: str,
    tiles: Sequence[int],
    multiprocessors: int,
    tensor_cores: bool,  # noqa: FBT001
    crossover: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply x, float16 or bfloat16 [M, K], by a laid out weight; y [M, out_features]."""
    rows, in_features = x.shape
    if rows == 0:
        return torch.empty(rows, out_features, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        if rows >= crossover:
            weight = _dequantized(x, words, table, bits, group_shift, scales)
            weight = weight[:, :out_features]
            y = x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
            return y.to(dtype)
        y = torch.empty(rows, out_features, dtype=dtype, device=x.device)
        among = BUCKETS if tensor_cores else ROW_BUCKETS
        at = among.index(bucket(rows, among)) * FIELDS
        tile = Tile(*tiles[at : at + FIELDS])
        depth, span = (fit if tensor_cores else fit_units)(tile, bits, group_shift)
        steps = -(-in_features // STEP[bits]) * STEP[bits] // depth
        parts = tile.parts(rows, out_features, steps, multiprocessors)
        split = parts > 1
        sums = y
        if split:
            sums = torch.empty(parts, rows, out_features, dtype=torch.float32, device=x.device)
        multiply: Any = matmul.multiply if tensor_cores else fma.multiply_rows
        if x.data_ptr() % ALIGNED:
            x = x.clone()
        interpreted = not isinstance(multiply, JITFunction)
        special: dict[str, Any] = (
            {
                "EXPONENT": EXPONENTS[x.dtype],
                "STAGES": tile.stages,
                "INTERPRETED": interpreted,
            }
            if tensor_cores
            else {
                "DTYPE": DTYPES[x.dtype],
                "EVEN": in_features % depth == 0 and words.shape[1] % tile.block_n == 0,
                "EXPERTS": False,
                "SORTED": False,
            }
        )
        multiply[(-(-rows // tile.block_m), -(-out_features // tile.block_n), parts)](
            x if tensor_cores else x.view(torch.int32),
            words,
            table,
            bias,
            sums,
            *(() if tensor_cores else (None, None)),
            rows,
            out_features,
            in_features,
            words.stride(0),
            steps,
            parts,
            group_shift,
            *(() if tensor_cores else (0, 0, 1)),
            BITS=bits,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=depth,
            SPAN=span,
            SCALES=SCALES[scales],
            BIAS=bias is not None and not split,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **special,
        )
        if split:
            add_parts(sums, bias, y)
    return y


def add_parts(sums: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Write the sum of the parts, float32 [parts, M, N], and a bias into y [M, N]."""
    kernel: Any = matmul.add_parts
    columns = y.shape[1]
    kernel[(-(-y.numel() // ADDED),)](
        sums, bias, y, y.numel(), columns, len(sums), BIAS=bias is not None, BLOCK=ADDED
    )


def _dequantized(
    x: torch.Tensor,
    words: torch.Tensor,
    table: torch.Tensor,
    bits: int,
    group_shift: int,
    scales: str,
) -> torch.Tensor:
    """Dequantise the whole weight to x's dtype: [K, S].

    Its memory is torch's allocator's, which gives the next layer the same: one block a device,
    as large as its largest layer, and another where a graph or a stream has a pool of its own.
    """
    rows, columns = x.shape[1], words.shape[1]
    weight = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    unit = unit_rows(bits)
    dequantize: Any = fma.dequantize
    dequantize[(-(-rows // unit), -(-columns // DEQUANTIZED))](
        words,
        table,
        weight,
        rows,
        columns,
        words.stride(0),
        group_shift,
        BITS=bits,
        BLOCK_N=DEQUANTIZED,
        SPAN=min(1 << group_shift, unit),
        SCALES=SCALES[scales],
    )
    return weight


@multiply_packed.register_fake
def _shape_of(  # noqa: PLR0913, PLR0917
    x: torch.Tensor,
    words: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    out_features: int,
    group_shift: int,
    scales: str,
    tiles: Sequence[int],
    multiprocessors: int,
    tensor_cores: bool,  # noqa: FBT001
    crossover: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    del words, table, bias, bits, group_shift, scales, tiles, multiprocessors, tensor_cores
    del crossover
    return x.new_empty(x.shape[0], out_features, dtype=dtype)
