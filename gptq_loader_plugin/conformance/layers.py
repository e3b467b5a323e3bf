"""Make seeded random layers of every kind, as a checkpoint stores them, with their weight."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from gptq_loader_plugin.checkpoint.infer import row_groups
from gptq_loader_plugin.checkpoint.zeros import lost_columns, true_zeros
from gptq_loader_plugin.conformance.packer import write_qweight, write_qzeros
from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.zeros import ZerosFormat
    from gptq_loader_plugin.kernel.packing import Bits, Layout

__all__ = ["NAME", "Case", "StoredLayer", "make_layer", "make_spec", "roll_columns", "store_layer"]

NAME = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of layer.

    Attributes:
        bits: the width of a code.
        group_size: rows of a group, -1 for one group, or 0 for some 32 rows, uneven.
        act_order: whether rows are out of group order.
        sym: whether all zeros are the middle.
        rows: in_features.
        columns: out_features.
        dtype: the scales' dtype, as torch names it.
        bias: whether the layer has one.
        layout: how codes lie in words.
        extreme_zeros: whether asymmetric zeros include 0 and the greatest code.
        zeros_format: how zeros are stored; planar files always store v2.
        trivial: whether a g_idx is stored, and act-order claimed, though rows are in order.
        uneven: 0 for groups of equal size, else their sizes are random multiples of this.
    """

    bits: int = 4
    group_size: int = 128
    act_order: bool = True
    sym: bool = True
    rows: int = 256
    columns: int = 96
    dtype: str = "float16"
    bias: bool = False
    layout: Layout = "continuous"
    extreme_zeros: bool = False
    zeros_format: ZerosFormat = "v1"
    trivial: bool = False
    uneven: int = 0

    def __str__(self) -> str:
        """Name the kind, as test ids do."""
        parts = [f"{self.bits}bit", f"g{self.group_size}", f"{self.rows}x{self.columns}"]
        parts += ["act"] if self.act_order else []
        parts += ["trivial"] if self.trivial else []
        parts += [f"uneven{self.uneven}"] if self.uneven else []
        parts += ["sym" if self.sym else "asym"]
        parts += ["zeros"] if self.extreme_zeros else []
        parts += [self.dtype] if self.dtype != "float16" else []
        parts += ["bias"] if self.bias else []
        parts += ["planar"] if self.layout == "planar" else []
        parts += [self.stored_zeros] if self.stored_zeros != "v1" else []
        return "-".join(parts)

    @property
    def stored_zeros(self) -> ZerosFormat:
        """How the zeros are stored."""
        return "v2" if self.layout == "planar" else self.zeros_format

    @property
    def groups(self) -> int:
        """How many groups there are."""
        size = self.rows if self.group_size < 0 else self.group_size or 32
        return -(-self.rows // size)

    @property
    def zero_range(self) -> tuple[int, int]:
        """The least and the greatest zero: both occur."""
        middle, greatest = 1 << (self.bits - 1), (1 << self.bits) - 1
        if self.sym:
            return middle, middle
        return (0, greatest) if self.extreme_zeros else (1, greatest - 1)


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer as a checkpoint stores it.

    Attributes:
        qweight: int32 [K * bits / 32, N].
        qzeros: int32 [G, N * bits / 32 rounded down].
        scales: float [G, N].
        g_idx: int32 [K], or None where the writer left it out.
        bias: float [N], or None.
        weight: float64 [N, K], what the layer means.
    """

    qweight: NDArray[np.int32]
    qzeros: NDArray[np.int32]
    scales: torch.Tensor
    g_idx: NDArray[np.int32] | None
    bias: torch.Tensor | None
    weight: torch.Tensor


def make_layer(case: Case) -> tuple[LayerSpec, PackedLinear, torch.Tensor]:
    """Make the layer of a case: its spec, its tensors as they are read, its weight, float64 [N, K].

    The tensors take the way of a checkpoint's: zeros are stored in the case's format and read by
    `true_zeros`, and a g_idx that is not stored is made up by `row_groups`.
    """
    stored, spec = store_layer(case), make_spec(case)
    zeros = true_zeros(
        stored.qzeros,
        bits=case.bits,
        layout=case.layout,
        columns=case.columns,
        zeros_format=case.stored_zeros,
    )
    groups = row_groups(
        stored.g_idx, rows=case.rows, groups=case.groups, group_size=spec.group_size
    )
    packed = PackedLinear(
        qweight=torch.from_numpy(stored.qweight),
        zeros=torch.from_numpy(zeros),
        scales=stored.scales,
        g_idx=torch.from_numpy(groups),
        bits=spec.bits,
        layout=case.layout,
        bias=stored.bias,
    )
    return spec, packed, stored.weight


def roll_columns(
    packed: PackedLinear, weight: torch.Tensor, shift: int
) -> tuple[PackedLinear, torch.Tensor]:
    """Move a layer's columns on by `shift`: another layer of the same case."""
    bias = None if packed.bias is None else packed.bias.roll(shift)
    tensors = {
        name: getattr(packed, name).roll(shift, 1) for name in ("qweight", "zeros", "scales")
    }
    return dataclasses.replace(packed, bias=bias, **tensors), weight.roll(shift, 0)


def make_spec(case: Case) -> LayerSpec:
    """Make the spec of a case, as its headers, g_idx and zeros would say it."""
    g_idx = _row_groups(case)
    counts = np.bincount(g_idx, minlength=case.groups)
    in_order = case.groups == 1 or bool((g_idx[1:] >= g_idx[:-1]).all())
    claimed = case.groups == 1 and (case.act_order or case.trivial)
    return LayerSpec(
        name=NAME,
        in_features=case.rows,
        out_features=case.columns,
        bits=cast("Bits", case.bits),
        group_size=-1 if case.groups == 1 else int(counts.max()),
        desc_act=claimed or not in_order,
        sym=case.sym,
        groups=case.groups,
        group_rows=(int(counts.min()), int(counts.max())),
        group_unit=int(np.gcd.reduce(counts)),
        zero_range=case.zero_range,
        layout=case.layout,
        scales_dtype=case.dtype,
        bias=case.bias,
    )


def store_layer(case: Case) -> StoredLayer:
    """Write the tensors of a case as a checkpoint's writer does."""
    random = np.random.default_rng([_seed(case), 1])
    g_idx = _row_groups(case)
    codes = random.integers(0, 1 << case.bits, (case.rows, case.columns), dtype=np.uint8)
    zeros = _zeros(case, random)
    scales = torch.from_numpy(random.uniform(0.005, 0.02, zeros.shape)).to(
        getattr(torch, case.dtype)
    )
    bias = torch.from_numpy(random.standard_normal(case.columns)).to(scales.dtype)
    # Written out here, and not by PackedLinear.dequantize, so that the suite has its own oracle.
    weight = codes.astype(np.float64)
    weight -= zeros.astype(np.float64)[g_idx]
    weight *= scales.double().numpy()[g_idx]
    left_out = not (case.act_order or case.trivial or case.uneven or case.group_size == 0)
    return StoredLayer(
        qweight=write_qweight(codes, case.bits, case.layout),
        qzeros=write_qzeros(zeros, case.bits, case.layout, case.stored_zeros),
        scales=scales,
        g_idx=None if left_out else g_idx,
        bias=bias if case.bias else None,
        weight=torch.from_numpy(np.ascontiguousarray(weight.T)),
    )


def _zeros(case: Case, random: np.random.Generator) -> NDArray[np.uint8]:
    """Draw zeros around the middle, as real ones are, the least and the greatest among them."""
    low, high = case.zero_range
    middle, half = 1 << (case.bits - 1), case.columns // 2
    beside = random.normal(0, (1 << case.bits) / 8, (case.groups, case.columns)).round()
    beside[:, half : 2 * half] = -beside[:, :half]  # their mean tells v1 from v2
    zeros = (middle + beside).clip(low, high).astype(np.uint8)
    zeros[0, :2] = low, high
    # The writers drop a last, partial word; its zeros are read as the middle.
    if lost := lost_columns(case.columns * case.bits // 32, bits=case.bits, columns=case.columns):
        zeros[:, -lost:] = middle
    return zeros


def _row_groups(case: Case) -> NDArray[np.int32]:
    """Draw the group of each row."""
    random = np.random.default_rng([_seed(case), 0])
    step = case.uneven or int(case.group_size == 0)
    if step and case.groups > 1:
        units = case.rows // step
        sizes = np.ones(case.groups, dtype=np.int64)
        sizes += random.multinomial(units - case.groups, np.full(case.groups, 1 / case.groups))
        if (sizes == sizes[0]).all():
            sizes[0], sizes[-1] = sizes[0] + 1, sizes[-1] - 1
        g_idx = np.repeat(np.arange(case.groups), sizes * step)
    else:
        size = case.rows if case.group_size < 0 else case.group_size or 32
        g_idx = np.arange(case.rows) // size
    if case.act_order:
        random.shuffle(g_idx)
    return g_idx.astype(np.int32)


def _seed(case: Case) -> int:
    """Make a seed that is the same in every process, unlike hash()."""
    return zlib.crc32(str(case).encode())
