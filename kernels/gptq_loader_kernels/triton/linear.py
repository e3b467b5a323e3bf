"""The module over the Triton kernels; imports torch and triton."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING

import torch

from gptq_loader_kernels.autograd import by_identity, needs_gradient, with_gradient
from gptq_loader_kernels.side_by_side import join_modules, stack_modules
from gptq_loader_kernels.triton.crossover import NEVER
from gptq_loader_kernels.triton.experts import TritonExperts
from gptq_loader_kernels.triton.layout import lay_out
from gptq_loader_kernels.triton.operator import multiply_packed
from gptq_loader_kernels.triton.shape import VECTOR
from gptq_loader_plugin.model.watch import CountedModule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_kernels.triton.tiles import Tile
    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = ["TritonLinear"]

DTYPES = (torch.float16, torch.bfloat16)  # what tensor cores multiply; codes are exact in both


class TritonLinear(CountedModule):
    """y = x @ W.T + bias, decoding packed codes inside the matmul.

    `forward` looks at no value of a tensor and never waits for the device, so a CUDA graph can
    capture it. What it allocates comes from torch's allocator: y; the partial sums, float32
    [parts, M, N], where K is split; x in order of the groups, where rows were out of order; x in
    16 bits, where it came in 32; and from `crossover` rows on, the weight in 16 bits.

    Args:
        layer: a layer that `TritonKernel.consider` accepted.
        packed: its tensors.
        device: torch's name of the device.
        tiles: the tile of each bucket.
        multiprocessors: how many the GPU has.
        dtype: what x is rounded to where it comes in 32 bits; `layer.half_dtype` if not given.
        tensor_cores: whether the tiles are those that use them.
        crossover: from how many rows of x on the weight is dequantised for torch to multiply by.
        expert_tiles: the tile of each of `ROW_BUCKETS`, where it is an expert of a mixture.
    """

    def __init__(
        self,
        layer: LayerSpec,
        packed: PackedLinear,
        device: str,
        *,
        tiles: tuple[Tile, ...],
        multiprocessors: int,
        dtype: str | None = None,
        tensor_cores: bool = True,
        crossover: int = NEVER,
        expert_tiles: tuple[Tile, ...] = (),
    ) -> None:
        super().__init__()
        self.bits = layer.bits
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype: torch.dtype = getattr(torch, dtype or layer.half_dtype)
        self.scales = str(packed.scales.dtype).removeprefix("torch.")
        self.tiles = [it for tile in tiles for it in astuple(tile)]
        self.expert_tiles = [it for tile in expert_tiles for it in astuple(tile)]
        self.multiprocessors = multiprocessors
        self.tensor_cores, self.crossover = tensor_cores, crossover
        shape, words, table, permutation = lay_out(layer, packed, device)
        self.group_shift = shape.group_shift
        bias = None if packed.bias is None else packed.bias.to(device, torch.float32)
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("permutation", permutation, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.words: torch.Tensor
        self.table: torch.Tensor
        self.permutation: torch.Tensor | None
        self.bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features]."""
        if needs_gradient(x):
            return with_gradient(self, x, by_identity)
        rows = x.reshape(-1, self.in_features)
        if x.dtype not in DTYPES:
            rows = rows.to(self.dtype)
        if self.permutation is not None:
            rows = rows.index_select(1, self.permutation)
        y = multiply_packed(
            rows.contiguous(),
            self.words,
            self.table,
            self.bias,
            self.bits,
            self.out_features,
            self.group_shift,
            self.scales,
            self.tiles,
            self.multiprocessors,
            self.tensor_cores,
            self.crossover,
            x.dtype,
        )
        shaped: torch.Tensor = y.view(*x.shape[:-1], self.out_features)
        return shaped

    def join(self, others: Sequence[torch.nn.Module]) -> TritonLinear | None:
        """Join modules of the same x, as `gptq_loader_plugin.kernel.Joinable` has it."""
        before = (self, *others)[:-1]
        if any(getattr(it, "out_features", 1) % VECTOR for it in before):
            return None  # its columns are padded, which would lie between the parts
        settings = (
            "bits", "in_features", "dtype", "scales", "tiles", "multiprocessors", "tensor_cores",
            "crossover", "group_shift",
        )  # fmt: skip
        along = {"words": 1, "table": 2, "bias": 0, "permutation": None}
        return join_modules(self, others, settings=settings, along=along)

    def stack(self, experts: Sequence[Sequence[torch.nn.Module]]) -> TritonExperts | None:
        """Stack experts, of which this is the first; `gptq_loader_plugin.kernel.Stackable`."""
        first = [part for part in experts[0] if isinstance(part, TritonLinear)]
        if len(first) != len(experts[0]) or any(part.out_features % VECTOR for part in first[:-1]):
            return None
        settings = ("bits", "in_features", "dtype", "scales", "group_shift", "expert_tiles")
        along = {"words": 1, "table": 2, "bias": 0, "permutation": None}
        stacked = stack_modules(experts, settings=settings, along=along)
        if stacked is None:
            return None
        if stacked["permutation"] is not None:
            stacked["permutation"] = stacked["permutation"].long()
        return TritonExperts(self, stacked, sum(part.out_features for part in first))

    def use(self, place: int, tile: Tile) -> None:
        """Use another tile for one bucket."""
        fields = astuple(tile)
        self.tiles[place * len(fields) : (place + 1) * len(fields)] = fields

    def extra_repr(self) -> str:
        """Say the shape and width when printed."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"
