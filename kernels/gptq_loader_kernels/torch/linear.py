"""The module over torch's own operators; imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from gptq_loader_kernels.autograd import needs_gradient, with_gradient
from gptq_loader_kernels.side_by_side import join_modules
from gptq_loader_kernels.torch.shape import (
    FEW_ROWS,
    PART,
    PART_OF,
    TILE,
    TILE_OF,
    Shape,
    part_columns,
)
from gptq_loader_kernels.torch.unpack import pack_planes, unpack_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = ["TorchLinear"]

RAW = {2: torch.int16, 4: torch.int32}  # what a scale's bits are kept as, by its bytes


class TorchLinear(torch.nn.Module):
    """y = x @ W.T + bias, a part of W's columns at a time: unpacked, multiplied, and let go.

    `forward` looks at no value of a tensor and never waits for the device, so a CUDA graph can
    capture it and `torch.compile` traces it whole. A part's weights are a temporary of torch's
    allocator, which hands the same memory to the next part and the next layer: one part's memory
    for all layers of a device, and no two streams or threads write into one.

    Args:
        layer: any layer.
        packed: its tensors.
        device: torch's name of the device.
        dtype: what to multiply in, as torch names it.
    """

    def __init__(self, layer: LayerSpec, packed: PackedLinear, device: str, *, dtype: str) -> None:
        super().__init__()
        shape = Shape.of(layer)
        self.bits, self.dtype = layer.bits, getattr(torch, dtype)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.prepared_for = device
        kind = torch.device(device).type
        self.tile_columns = part_columns(layer.in_features, TILE_OF.get(kind, TILE))
        self.part_columns = part_columns(layer.in_features, PART_OF.get(kind, PART))
        permutation = packed.permutation() if shape.permuted else None
        planes = pack_planes(packed.codes(permutation).t().contiguous(), layer.bits)
        zeros = packed.zeros[:1, :1] if shape.one_zero else packed.zeros
        groups = None
        if shape.listed:
            units = torch.bincount(packed.g_idx.long(), minlength=layer.groups) // shape.unit
            groups = torch.arange(layer.groups, dtype=torch.int32).repeat_interleave(units)
        # Raw bits: a model's .to(dtype) changes no integer.
        self.scales_dtype = packed.scales.dtype
        scales = _transposed(packed.scales).view(RAW[packed.scales.element_size()])
        self.planes = len(planes)
        buffers = {f"plane{which}": plane for which, plane in enumerate(planes)} | {
            "scales": scales,
            "zeros": _transposed(zeros),
            "groups": groups,
            "permutation": None if permutation is None else permutation.to(torch.int32),
            "bias": None if packed.bias is None else packed.bias.to(self.dtype),
            "shifts": torch.arange(8, dtype=torch.uint8),
        }
        for name, tensor in buffers.items():
            there = None if tensor is None else tensor.to(device, copy=True)
            self.register_buffer(name, there, persistent=False)
        self.scales: torch.Tensor
        self.zeros: torch.Tensor
        self.groups: torch.Tensor | None
        self.permutation: torch.Tensor | None
        self.bias: torch.Tensor | None
        self.shifts: torch.Tensor
        self.unpack_weight: Callable[..., torch.Tensor] = unpack_weight  # or that, compiled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features]."""
        if needs_gradient(x):
            return with_gradient(self, x, _input_gradient)
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        if self.permutation is not None:
            rows = rows.index_select(1, self.permutation)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        # a compiled step plans its own memory: it has no use for tiles, and would trace each
        few = not torch.compiler.is_compiling() and rows.shape[0] <= FEW_ROWS
        parts = [
            functional.linear(
                rows, self.unpack(first, last), None if bias is None else bias[first:last]
            )
            for first, last in self.ranges(self.tile_columns if few else self.part_columns)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def ranges(self, columns: int) -> Iterator[tuple[int, int]]:
        """List the output columns in parts: the first of each, and the one after its last."""
        for first in range(0, self.out_features, columns):
            yield first, min(first + columns, self.out_features)

    def unpack(self, first: int, last: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Unpack some output columns: [last - first, in_features], in the order of the groups."""
        return self.unpack_weight(*self.unpack_arguments(first, last, dtype or self.dtype))

    def unpack_arguments(self, first: int, last: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return what `unpack_weight` takes for some output columns."""
        return (
            [self.get_buffer(f"plane{which}")[first:last] for which in range(self.planes)],
            self.scales.view(self.scales_dtype)[first:last],
            self.zeros if len(self.zeros) == 1 else self.zeros[first:last],
            self.groups,
            self.shifts,
            self.bits,
            dtype,
        )

    def join(self, others: Sequence[torch.nn.Module]) -> TorchLinear | None:
        """Join modules of the same x, as `gptq_loader_plugin.kernel.Joinable` has it."""
        settings = (
            "bits", "dtype", "in_features", "planes", "scales_dtype", "unpack_weight",
            "prepared_for", "tile_columns", "part_columns",
        )  # fmt: skip
        along: dict[str, int | None] = {f"plane{which}": 0 for which in range(self.planes)}
        along |= {"scales": 0, "zeros": None if len(self.zeros) == 1 else 0, "bias": 0}
        along |= {"groups": None, "permutation": None}
        return join_modules(self, others, settings=settings, along=along)

    def extra_repr(self) -> str:
        """Say the shape and width when printed."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, dtype={self.dtype}"


def _transposed(table: torch.Tensor) -> torch.Tensor:
    """Transpose a table into strides of its own, which compiled code sees even of a side of 1."""
    return table.new_empty(table.shape[1], table.shape[0]).copy_(table.t())


def _input_gradient(module: TorchLinear, gradient: torch.Tensor) -> torch.Tensor:
    """Multiply y's gradient, float32 [M, N], by the weight in float32: exact."""
    back = gradient.new_zeros(len(gradient), module.in_features)
    for first, last in module.ranges(module.tile_columns):
        back.addmm_(gradient[:, first:last], module.unpack(first, last, torch.float32))
    if module.permutation is None:
        return back
    return torch.empty_like(back).index_copy_(1, module.permutation.long(), back)
