"""The module over the Triton kernel; imports torch and triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_kernels.triton.matmul import matmul

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = ["TritonLinear"]

BLOCK_KS = (64, 32, 16)  # rows of a tile: the most that lie in one group
BLOCK_N = 64
SMALL_M, LARGE_M = 16, 64  # rows of x in a tile: the least tl.dot takes, and for prompts
ENOUGH_TILES = 256  # programs that fill a GPU: two for each of an A100's 108 multiprocessors
MOST_PARTS = 16


class TritonLinear(torch.nn.Module):
    """y = x @ W.T + bias, decoding packed codes inside the matmul.

    Args:
        layer: a layer that `TritonKernel.consider` accepted.
        packed: its tensors.
        device: torch's name of the device.
    """

    def __init__(self, layer: LayerSpec, packed: PackedLinear, device: str) -> None:
        super().__init__()
        self.bits = layer.bits
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.block_k = next(it for it in BLOCK_KS if layer.group_unit % it == 0)
        self.dtype: torch.dtype = getattr(torch, layer.half_dtype)
        permutation = packed.permutation()
        groups = packed.g_idx if permutation is None else packed.g_idx[permutation]
        tensors = {
            "words": packed.words(permutation).contiguous(),
            "zeros": packed.zeros.contiguous(),
            "scales": packed.scales.contiguous(),
            "tile_groups": groups[:: self.block_k].to(torch.int32).contiguous(),
            "permutation": permutation,
            "bias": None if packed.bias is None else packed.bias.float(),
        }
        for name, tensor in tensors.items():
            moved = None if tensor is None else tensor.to(device)
            self.register_buffer(name, moved, persistent=False)
        self.words: torch.Tensor
        self.zeros: torch.Tensor
        self.scales: torch.Tensor
        self.tile_groups: torch.Tensor
        self.permutation: torch.Tensor | None
        self.bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features]."""
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        if self.permutation is not None:
            rows = rows.index_select(1, self.permutation)
        rows = rows.contiguous()
        count = rows.shape[0]
        block_m = SMALL_M if count <= SMALL_M else LARGE_M
        tiles_m, tiles_n = -(-count // block_m), -(-self.out_features // BLOCK_N)
        tiles_k = self.in_features // self.block_k
        parts = max(1, min(ENOUGH_TILES // (tiles_m * tiles_n), MOST_PARTS, tiles_k))
        y = torch.empty(parts, count, self.out_features, dtype=torch.float32, device=rows.device)
        launch: Any = matmul
        launch[(tiles_m, tiles_n, parts)](
            rows,
            self.words,
            self.zeros,
            self.scales,
            self.tile_groups,
            y,
            count,
            self.out_features,
            self.in_features,
            BITS=self.bits,
            BLOCK_M=block_m,
            BLOCK_N=BLOCK_N,
            BLOCK_K=self.block_k,
            SPLIT_K=parts,
        )
        total = y.sum(dim=0) if parts > 1 else y[0]
        if self.bias is not None:
            total = total + self.bias
        return total.view(*x.shape[:-1], self.out_features).to(x.dtype)
