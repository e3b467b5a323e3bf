"""The module over exllamav2's `q_matrix`; imports torch and the extension, so only in `prepare`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.checkpoint.packing import pack_columns

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = ["ExllamaLinear"]

MULTIPLE = 32
# A product of more than 32 rows dequantises the weight in slabs of so many elements and uses
# cuBLAS; exllamav2's own limit (config.py, max_dq_size).
SLAB_ELEMENTS = 512 * 1024**2
SLAB_ROWS = 128


class ExllamaLinear(torch.nn.Module):
    """y = x @ W.T + bias through `exllamav2_ext.gemm_half_q_half`, in float16.

    Args:
        layer: a layer that `ExllamaKernel.consider` accepted.
        packed: its tensors; they are copied, because the extension rewrites them in place.
        device: torch's name of the GPU.
    """

    def __init__(self, layer: LayerSpec, packed: PackedLinear, device: str) -> None:
        super().__init__()
        self._extension: Any = importlib.import_module("exllamav2_ext")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        padding = -layer.out_features % MULTIPLE
        self._columns = layer.out_features + padding
        # Stored as v1 stores them, field by field: every zero is 1..15, so nothing borrows.
        zeros = torch.nn.functional.pad(packed.zeros, (0, padding), value=8) - 1
        none = torch.empty((1, 1), device="meta")
        ordered = packed.permutation() is None
        self._tensors = {  # kept, because the extension holds their addresses
            "q_weight": torch.nn.functional.pad(packed.words(), (0, padding)).to(device),
            "gptq_qzeros": torch.from_numpy(pack_columns(zeros.numpy(), 4, "continuous")).to(
                device
            ),
            "gptq_scales": torch.nn.functional.pad(packed.scales.half(), (0, padding)).to(device),
            "q_perm": none
            if ordered
            else torch.empty(layer.in_features, dtype=torch.short, device=device),
            "q_invperm": none
            if ordered
            else torch.empty(layer.in_features, dtype=torch.short, device=device),
            # on the CPU: the extension reads it there to sort rows
            "gptq_g_idx": none if ordered else packed.g_idx.clone(),
        }
        slab_rows = min(
            -(-layer.in_features // SLAB_ROWS) * SLAB_ROWS,
            max(SLAB_ELEMENTS // self._columns // SLAB_ROWS, 1) * SLAB_ROWS,
        )
        self._scratch = torch.empty(slab_rows * self._columns, dtype=torch.half, device=device)
        tensors = self._tensors
        self._handle: int = self._extension.make_q_matrix(
            tensors["q_weight"],
            tensors["q_perm"],
            tensors["q_invperm"],
            none,  # q_scale, q_scale_max, q_groups and q_group_map are EXL2's
            none,
            none,
            none,
            tensors["gptq_qzeros"],
            tensors["gptq_scales"],
            tensors["gptq_g_idx"],
            none,  # the bias is added here
            self._scratch,
            slab_rows,
        )
        bias = None if packed.bias is None else packed.bias.to(device, torch.half)
        self.register_buffer("bias", bias, persistent=False)
        self.bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features]."""
        rows = x.reshape(-1, self.in_features).to(torch.half).contiguous()
        y = torch.zeros(rows.shape[0], self._columns, dtype=torch.half, device=rows.device)
        self._extension.gemm_half_q_half(rows, self._handle, y, False)  # noqa: FBT003
        y = y[:, : self.out_features]
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def __del__(self) -> None:
        """Free what the extension allocated."""
        if getattr(self, "_handle", 0):
            self._extension.free_q_matrix(self._handle)
