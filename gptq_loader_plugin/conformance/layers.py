"""Make seeded random layers of every kind, with their weight in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from gptq_loader_plugin.checkpoint.packing import pack_rows
from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

if TYPE_CHECKING:
    from gptq_loader_plugin.checkpoint.packing import Bits, Layout

__all__ = ["Case", "make_layer"]


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table.

    Attributes:
        bits: the width of a code.
        group_size: rows of a group, -1 for one group, or 0 for groups of unequal random sizes.
        act_order: whether rows are out of group order.
        sym: whether all zeros are the middle.
        rows: in_features.
        columns: out_features.
        dtype: the scales' dtype, as torch names it.
        bias: whether the layer has one.
        layout: how codes lie in words.
        extreme_zeros: whether asymmetric zeros include 0 and the greatest code.
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

    def __str__(self) -> str:
        """Name the cell, as the suite's test ids and skip tables do."""
        parts = [f"{self.bits}bit", f"g{self.group_size}", f"{self.rows}x{self.columns}"]
        parts += ["act"] if self.act_order else []
        parts += ["sym" if self.sym else "asym"]
        parts += ["zeros"] if self.extreme_zeros else []
        parts += [self.dtype] if self.dtype != "float16" else []
        parts += ["bias"] if self.bias else []
        parts += ["planar"] if self.layout == "planar" else []
        return "-".join(parts)


def make_layer(case: Case) -> tuple[LayerSpec, PackedLinear, torch.Tensor]:
    """Make the layer of a case: its spec, its tensors, and its weight, float64 [N, K]."""
    random = np.random.default_rng(_seed(case))
    rows, columns, greatest = case.rows, case.columns, (1 << case.bits) - 1
    g_idx = _groups(case, random)
    groups = int(g_idx.max()) + 1
    codes = random.integers(0, greatest + 1, (rows, columns), dtype=np.uint8)
    zeros = np.full((groups, columns), 1 << (case.bits - 1), dtype=np.uint8)
    if not case.sym:
        low, high = (0, greatest) if case.extreme_zeros else (1, greatest - 1)
        zeros = random.integers(low, high + 1, (groups, columns), dtype=np.uint8)
        zeros[0, :2] = low, high
    scales = torch.from_numpy(random.uniform(0.005, 0.02, (groups, columns))).to(
        getattr(torch, case.dtype)
    )
    bias = torch.from_numpy(random.standard_normal(columns)).float() if case.bias else None
    counts = np.bincount(g_idx, minlength=groups)
    spec = LayerSpec(
        name="model.layers.0.mlp.up_proj",
        in_features=rows,
        out_features=columns,
        bits=cast("Bits", case.bits),
        group_size=-1 if groups == 1 else int(counts.max()),
        desc_act=bool((g_idx[1:] < g_idx[:-1]).any()),
        sym=case.sym,
        groups=groups,
        group_rows=(int(counts.min()), int(counts.max())),
        group_unit=int(np.gcd.reduce(counts)),
        zero_range=(int(zeros.min()), int(zeros.max())),
        layout=case.layout,
        scales_dtype=case.dtype,
        bias=case.bias,
    )
    packed = PackedLinear(
        qweight=torch.from_numpy(pack_rows(codes, case.bits, case.layout)),
        zeros=torch.from_numpy(zeros),
        scales=scales,
        g_idx=torch.from_numpy(g_idx),
        bits=spec.bits,
        layout=case.layout,
        bias=bias,
    )
    # Written out here, and not by PackedLinear.dequantize, so that the suite has its own oracle.
    row_scales = scales.double().numpy()[g_idx]
    weight = row_scales * (codes.astype(np.float64) - zeros.astype(np.float64)[g_idx])
    return spec, packed, torch.from_numpy(np.ascontiguousarray(weight.T))


def _seed(case: Case) -> int:
    """Make a seed that is the same in every process, unlike hash()."""
    return int.from_bytes(str(case).encode(), "little") % 2**32


def _groups(case: Case, random: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    if case.group_size == 0:
        groups = case.rows // 32
        g_idx = np.concatenate([np.arange(groups), random.integers(0, groups, case.rows - groups)])
        g_idx.sort()
    else:
        size = case.rows if case.group_size < 0 else case.group_size
        g_idx = np.arange(case.rows) // size
    if case.act_order:
        random.shuffle(g_idx)
    return g_idx.astype(np.int32)
