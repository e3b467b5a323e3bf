"""The module over exllamav2's `q_matrix`; imports torch and the extension, so only in `prepare`.

The extension holds the addresses of what it is handed, and of one scratch buffer that every layer
of a device shares. So a layer is handed over when it is first needed: by then every layer of the
model has reserved what it wants of the scratch, which is allocated once, for the largest.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from gptq_loader_kernels.autograd import by_identity, needs_gradient, with_gradient
from gptq_loader_kernels.exllama.extension import load_extension
from gptq_loader_kernels.exllama.shape import MULTIPLE, dequantised_rows
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.kernel.packing import pack_columns

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = ["ExllamaLinear", "Scratch"]


class Scratch:
    """Memory of one device in which its layers dequantise, one at a time, on one stream.

    Args:
        device: torch's name of it.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._elements = 0
        self._memory = torch.empty(0, dtype=torch.half, device=device)

    @property
    def nbytes(self) -> int:
        """The bytes it has allocated."""
        return self._memory.nbytes

    def reserve(self, elements: int) -> None:
        """Have room for so many elements once it is needed."""
        self._elements = max(self._elements, elements)

    def memory(self) -> torch.Tensor:
        """Give the memory: float16, one dimension, room for the largest reservation so far."""
        if self._memory.numel() < self._elements:
            self._memory = torch.empty(self._elements, dtype=torch.half, device=self._device)
        return self._memory


class ExllamaLinear(torch.nn.Module):
    """y = x @ W.T + bias through the extension's `gemm_half_q_half`, in float16.

    Args:
        layer: a layer that `ExllamaKernel.consider` accepted.
        packed: its tensors; they are copied, because the extension rewrites them in place.
        device: torch's name of the GPU.
        scratch: the memory it shares with the other layers there.
    """

    def __init__(
        self, layer: LayerSpec, packed: PackedLinear, *, device: str, scratch: Scratch
    ) -> None:
        super().__init__()
        self._extension: Any = load_extension()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        padding = -layer.out_features % MULTIPLE
        self._columns = layer.out_features + padding
        # Stored as v1 stores them, field by field: every zero is 1..15, so nothing borrows.
        zeros = torch.nn.functional.pad(packed.zeros, (0, padding), value=8) - 1
        self._tensors = {  # no buffers: the extension holds their addresses, and they must not move
            "q_weight": _copy(torch.nn.functional.pad(packed.words(), (0, padding)), device),
            "gptq_qzeros": _copy(
                torch.from_numpy(pack_columns(zeros.numpy(), 4, "continuous")), device
            ),
            "gptq_scales": _copy(
                torch.nn.functional.pad(packed.scales.half(), (0, padding)), device
            ),
            # Not the layer's bias, which is added afterwards and rounded once, but zeros to start
            # the sums from: without a bias the kernel clears y itself, in one of the blocks that
            # add to it, with nothing to make the others wait.
            "bias": torch.zeros(self._columns, dtype=torch.half, device=device),
        }
        if packed.permutation() is not None:  # rows in order would pay for a gather of x
            rows = torch.empty(layer.in_features, dtype=torch.short, device=device)
            self._tensors |= {
                "q_perm": rows,
                "q_invperm": torch.empty_like(rows),
                # on the CPU: the extension reads it there to sort the rows
                "gptq_g_idx": packed.g_idx.to("cpu", torch.int32, copy=True).contiguous(),
            }
        self._dequantised_rows = dequantised_rows(self.in_features, self._columns)
        scratch.reserve(self.in_features * self._columns if self._dequantised_rows else 0)
        self._scratch = scratch
        self._handle = 0
        self._free: weakref.finalize[Any, Any] | None = None
        self._device = torch.device(device)
        bias = None if packed.bias is None else packed.bias.to(device, torch.half)
        self.register_buffer("bias", bias, persistent=False)
        self.bias: torch.Tensor | None

    def hand_over(self) -> None:
        """Have the extension sort and shuffle the weight in place; done once, when first needed.

        Raises:
            GPTQLoaderError: the layer was closed.
        """
        if self._handle:
            return
        if not self._tensors:
            raise GPTQLoaderError("this layer is closed", hint="load the model again")
        tensors = self._tensors
        none = torch.empty((1, 1), device="meta")
        # Kept for as long as the handle is: a larger layer of another model may outgrow it.
        tensors["temp_dq"] = self._scratch.memory()
        self._handle = self._extension.make_q_matrix(
            tensors["q_weight"],
            tensors.get("q_perm", none),
            tensors.get("q_invperm", none),
            none,  # q_scale, q_scale_max, q_groups and q_group_map are EXL2's
            none,
            none,
            none,
            tensors["gptq_qzeros"],
            tensors["gptq_scales"],
            tensors.get("gptq_g_idx", none),
            tensors["bias"],
            tensors["temp_dq"],
            self._dequantised_rows,
        )
        self._free = weakref.finalize(self, self._extension.free_q_matrix, self._handle)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features].

        Raises:
            GPTQLoaderError: x is on another device, or the layer was closed.
        """
        if needs_gradient(x):
            return with_gradient(self, x, by_identity)
        if x.device != self._device:
            raise GPTQLoaderError(
                f"x is on {x.device}; this layer was prepared for {self._device}, and stays there",
                hint="load the model onto the device it is to run on",
            )
        self.hand_over()
        rows = x.reshape(-1, self.in_features).to(torch.half).contiguous()
        y = torch.empty(rows.shape[0], self._columns, dtype=torch.half, device=rows.device)
        if len(rows):
            self._extension.gemm_half_q_half(rows, self._handle, y, False)  # noqa: FBT003
        y = y[:, : self.out_features]
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def close(self) -> None:
        """Free what the extension allocated, and the tensors it was handed."""
        if self._free is not None:
            self._free()
        self._handle = 0
        self._tensors.clear()

    def extra_repr(self) -> str:
        """Say the shape when printed."""
        return f"{self.in_features}, {self.out_features}, 4-bit, ExLlama"

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied: two modules would free one handle."""
        raise TypeError("a layer that ExLlama holds cannot be copied or pickled")


def _copy(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return tensor.to(device, copy=True).contiguous()
