"""The experts of a mixture as one operator, whichever a token has; imports torch and triton.

Which expert multiplies which row is known to the device alone: the host launches the same kernels
whatever it is, so that a CUDA graph can hold them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from triton import next_power_of_2

from gptq_loader_kernels.triton import fma
from gptq_loader_kernels.triton.operator import DTYPES, FIELDS, SCALES, add_parts
from gptq_loader_kernels.triton.shape import STEP
from gptq_loader_kernels.triton.tiles import ROW_BUCKETS, Tile, bucket, fit_units

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TritonExperts", "multiply_experts"]


class TritonExperts(torch.nn.Module):
    """Multiply each row by the weight of its expert: what one product of a mixture is.

    Args:
        first: the first expert's module, whose settings all share.
        stacked: tensors of all experts, by their names in a `TritonLinear`.
        out_features: outputs of each expert, those of joined parts together.
    """

    def __init__(
        self,
        first: Any,  # noqa: ANN401 - a TritonLinear, which imports this
        stacked: dict[str, torch.Tensor | None],
        out_features: int,
    ) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features = first.bits, first.in_features, out_features
        self.dtype, self.scales, self.group_shift = first.dtype, first.scales, first.group_shift
        self.tiles, self.multiprocessors = first.expert_tiles, first.multiprocessors
        for name, tensor in stacked.items():
            self.register_buffer(name, tensor, persistent=False)
        self.words: torch.Tensor
        self.table: torch.Tensor
        self.permutation: torch.Tensor | None
        self.bias: torch.Tensor | None

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Args:
            x: [rows / n, in_features]; n rows of the answer are of one row of it.
            experts: int64 [rows], the expert of each.

        Returns:
            [rows, out_features].
        """
        rows = x if x.dtype in DTYPES else x.to(self.dtype)
        if self.permutation is not None:
            rows = rows.repeat_interleave(len(experts) // len(x), dim=0)
            rows = rows.gather(1, self.permutation.index_select(0, experts))
        y: torch.Tensor = multiply_experts(
            rows.contiguous(),
            experts.contiguous(),
            self.words,
            self.table,
            self.bits,
            self.out_features,
            self.group_shift,
            self.scales,
            self.tiles,
            self.multiprocessors,
            x.dtype,
        )
        return y if self.bias is None else y + self.bias.index_select(0, experts).to(y.dtype)


@torch.library.custom_op(
    "gptq_loader::multiply_experts",
    mutates_args=(),
    schema="(Tensor x, Tensor experts, Tensor words, Tensor table, int bits, int out_features, "
    "int group_shift, str scales, int[] tiles, int multiprocessors, ScalarType dtype) -> Tensor",
)
def multiply_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    words: torch.Tensor,
    table: torch.Tensor,
    bits: int,
    out_features: int,
    group_shift: int,
    scales: str,
    tiles: Sequence[int],
    multiprocessors: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply rows of x, float16 or bfloat16 [rows / n, K], by laid out weights [experts, ...].

    Few rows are each multiplied by themselves. Of more, those of one expert share tiles, so that
    its weight is decoded once for all of them.
    """
    rows, count = len(experts), len(words)
    y = torch.empty(rows, out_features, dtype=dtype, device=x.device)
    if rows == 0:
        return y
    with torch.cuda.device_of(x):
        at = ROW_BUCKETS.index(bucket(-(-rows // count), ROW_BUCKETS)) * FIELDS
        tile = Tile(*tiles[at : at + FIELDS])
        order = None
        if tile.block_m > 1:
            experts, order = _sorted(experts, count, tile.block_m)
        depth, span = fit_units(tile, bits, group_shift)
        steps = -(-x.shape[1] // STEP[bits]) * STEP[bits] // depth
        parts = tile.parts(len(experts) * tile.block_m, out_features, steps, multiprocessors)
        sums = y
        if parts > 1:
            sums = torch.empty(parts, rows, out_features, dtype=torch.float32, device=x.device)
        multiply: Any = fma.multiply_rows
        multiply[(len(experts), -(-out_features // tile.block_n), parts)](
            x.view(torch.int32),
            words,
            table,
            None,
            sums,
            experts,
            order,
            rows,
            out_features,
            x.shape[1],
            words.stride(1),
            steps,
            parts,
            group_shift,
            words.stride(0),
            table.stride(0),
            rows // len(x),
            BITS=bits,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=depth,
            SPAN=span,
            DTYPE=DTYPES[x.dtype],
            SCALES=SCALES[scales],
            EVEN=x.shape[1] % depth == 0 and words.shape[2] % tile.block_n == 0,
            BIAS=False,
            EXPERTS=True,
            SORTED=order is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if parts > 1:
            add_parts(sums, None, y)
    return y


@multiply_experts.register_fake
def _shape_of(
    x: torch.Tensor,
    experts: torch.Tensor,
    words: torch.Tensor,
    table: torch.Tensor,
    bits: int,
    out_features: int,
    group_shift: int,
    scales: str,
    tiles: Sequence[int],
    multiprocessors: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    del words, table, bits, group_shift, scales, tiles, multiprocessors
    return x.new_empty(experts.shape[0], out_features, dtype=dtype)


def _sorted(experts: torch.Tensor, count: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort rows into tiles of one expert each.

    Returns:
        The expert of each tile, int64, -1 for none, as many as there can be; and its rows, int32
        [tiles * block_m], as many as there are rows for none.
    """
    rows = len(experts)
    tiles = min(rows, rows // block_m + count)
    of_tiles = experts.new_full((tiles,), -1)
    order = torch.full((tiles * block_m,), rows, dtype=torch.int32, device=experts.device)
    sort: Any = fma.sort_by_expert
    sort[(count,)](
        experts,
        order,
        of_tiles,
        rows,
        BLOCK_P=next_power_of_2(rows),
        BLOCK_E=next_power_of_2(count + 1),
        BLOCK_M=block_m,
    )
    return of_tiles, order
