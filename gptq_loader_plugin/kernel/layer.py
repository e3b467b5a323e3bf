"""One quantised linear layer: what its headers say of it, and its tensors, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptq_loader_plugin.kernel.packing import pack_rows, unpack_rows

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from gptq_loader_plugin.kernel.packing import Bits, Layout

__all__ = ["LayerSpec", "PackedLinear"]

FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One quantised linear layer, by what its headers, its g_idx and its zeros say.

    Attributes:
        name: the module's path in the checkpoint, such as `model.layers.0.mlp.gate_proj`.
        in_features: K, the rows of the weight as GPTQ stores it.
        out_features: N, its columns.
        bits: the width of a code.
        group_size: input rows that share a scale, or -1 for one group.
        desc_act: whether the rows' groups are out of order (for one group: what the config says).
        sym: whether every zero is the same.
        groups: G, the number of groups.
        group_rows: the fewest and the most rows that any group has.
        group_unit: the greatest number that divides every group's rows.
        zero_range: the least and the greatest true zero.
        layout: how codes lie in words.
        scales_dtype: "float16", "bfloat16" or "float32".
        bias: whether the checkpoint has a bias beside it.
        model_dtype: the dtype of most of the model's plain weights, which it was made for.
    """

    name: str
    in_features: int
    out_features: int
    bits: Bits
    group_size: int
    desc_act: bool
    sym: bool
    groups: int
    group_rows: tuple[int, int]
    group_unit: int
    zero_range: tuple[int, int]
    layout: Layout = "continuous"
    scales_dtype: str = "float16"
    bias: bool = False
    model_dtype: str = "float16"

    @classmethod
    def from_groups(
        cls,
        name: str,
        rows_of_groups: NDArray[np.integer[Any]],
        *,
        out_features: int,
        bits: Bits,
        group_size: int,
        desc_act: bool,
        zero_range: tuple[int, int],
        layout: Layout = "continuous",
        scales_dtype: str = "float16",
        bias: bool = False,
        model_dtype: str = "float16",
    ) -> LayerSpec:
        """Describe a layer by how many rows each group has, as a reader of a format does.

        Args:
            name: the module's path in the checkpoint.
            rows_of_groups: [G], the rows of each group: np.bincount(g_idx).
            out_features: as for the class, and so are the others.
            bits: the width of a code.
            group_size: input rows that share a scale, or -1 for one group.
            desc_act: whether the rows' groups are out of order.
            zero_range: the least and the greatest true zero.
            layout: how codes lie in words.
            scales_dtype: "float16", "bfloat16" or "float32".
            bias: whether the checkpoint has a bias beside it.
            model_dtype: the dtype of most of the model's plain weights.
        """
        return cls(
            name=name,
            in_features=int(rows_of_groups.sum()),
            out_features=out_features,
            bits=bits,
            group_size=group_size,
            desc_act=desc_act,
            sym=zero_range[0] == zero_range[1],
            groups=len(rows_of_groups),
            group_rows=(int(rows_of_groups.min()), int(rows_of_groups.max())),
            group_unit=math.gcd(*map(int, rows_of_groups)),
            zero_range=zero_range,
            layout=layout,
            scales_dtype=scales_dtype,
            bias=bias,
            model_dtype=model_dtype,
        )

    def __str__(self) -> str:
        """Describe what kind of layer this is, without its name."""
        group = "no groups" if self.group_size < 0 else f"groups of {self.group_size}"
        order = ", act-order" if self.desc_act else ""
        return f"{self.bits}-bit {self.in_features}x{self.out_features}, {group}{order}"

    @property
    def even_groups(self) -> bool:
        """Whether every group has the same number of rows."""
        return self.group_rows[0] == self.group_rows[1]

    @property
    def half_dtype(self) -> str:
        """The 16-bit dtype that holds this model's activations without overflow."""
        return "bfloat16" if "bfloat16" in (self.scales_dtype, self.model_dtype) else "float16"

    @property
    def packed_bytes(self) -> int:
        """The bytes of its codes, zeros and scales in a checkpoint, g_idx left out."""
        codes = self.in_features * self.out_features * self.bits // 8
        scale_bytes = 4 if self.scales_dtype == "float32" else 2
        return codes + self.groups * self.out_features * (8 * scale_bytes + self.bits) // 8


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A layer's tensors, checked: codes as the checkpoint packs them, zeros made true.

    Tensors that do not fit each other are a ValueError: no kernel compares them again.

    The weight is w[n, k] = scales[g, n] * (codes[k, n] - zeros[g, n]) with g = g_idx[k].

    Attributes:
        qweight: int32 [K * bits / 32, N], as stored.
        zeros: uint8 [G, N], true zeros, whatever the format stored.
        scales: float [G, N], as stored.
        g_idx: int32 [K], the group of each row; always present here.
        bits: the width of a code.
        layout: how codes lie in `qweight`.
        bias: float [N], or None.
    """

    qweight: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bits: Bits
    layout: Layout = "continuous"
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Compare the tensors' dtypes and shapes."""
        rows, columns = len(self.g_idx), self.qweight.shape[-1]
        groups = len(self.scales)
        expected = {
            "qweight": (self.qweight, ("int32",), (rows * self.bits // 32, columns)),
            "zeros": (self.zeros, ("uint8",), (groups, columns)),
            "scales": (self.scales, FLOATS, (groups, columns)),
            "g_idx": (self.g_idx, ("int32",), (rows,)),
            "bias": (self.bias, FLOATS, (columns,)),
        }
        for name, (tensor, dtypes, shape) in expected.items():
            if tensor is None:
                continue
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in dtypes or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} is {dtype} {list(tensor.shape)}; a {self.bits}-bit layer of "
                    f"{rows}x{columns} with {groups} groups needs {' or '.join(dtypes)} "
                    f"{list(shape)}"
                )

    def permutation(self) -> torch.Tensor | None:
        """Order the rows by group: int64 [K], or None where they are in order as they are.

        Rows of one group keep their order, so layers with the same g_idx share one permutation.
        """
        import torch

        if bool((self.g_idx[1:] >= self.g_idx[:-1]).all()):
            return None
        return torch.argsort(self.g_idx, stable=True)

    def codes(self, permutation: torch.Tensor | None = None) -> torch.Tensor:
        """Unpack the codes: uint8 [K, N], rows in the order of `permutation` where one is given."""
        import torch

        unpacked = torch.from_numpy(unpack_rows(self.qweight.numpy(), self.bits, self.layout))
        return unpacked if permutation is None else unpacked[permutation]

    def words(self, permutation: torch.Tensor | None = None) -> torch.Tensor:
        """Return the codes packed continuously: int32 [K * bits / 32, N], rows in that order.

        Raises:
            ValueError: 5, 6 and 7 bits have no continuous form.
        """
        import torch

        if self.bits in (5, 6, 7):
            raise ValueError(f"{self.bits}-bit codes are planar; unpack them with codes()")
        if permutation is None and (self.layout == "continuous" or 32 % self.bits == 0):
            return self.qweight
        codes = self.codes(permutation).numpy()
        return torch.from_numpy(pack_rows(codes, self.bits, "continuous"))

    def take_columns(self, columns: torch.Tensor) -> PackedLinear:
        """Take some output columns, int64 [n], as a smaller layer."""
        return replace(
            self,
            qweight=self.qweight[:, columns],
            zeros=self.zeros[:, columns],
            scales=self.scales[:, columns],
            bias=None if self.bias is None else self.bias[columns],
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Compute the weight in float32, then round it once: [N, K], rows in their own order."""
        import torch

        g_idx = self.g_idx.long()
        weight = self.codes().to(torch.float32)
        weight -= self.zeros.to(torch.float32)[g_idx]
        weight *= self.scales.to(torch.float32)[g_idx]
        return weight.t().contiguous().to(dtype or torch.float32)
