"""A model's head through the native library: all logits, or exactly the greatest; imports torch."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_kernels._native import COLUMNS, Isa, load_library
from gptq_loader_kernels._native_linear import TYPES, NativeLinear
from gptq_loader_kernels._native_step import MOST_TOKENS
from gptq_loader_plugin.head import quantize_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RowsLinear", "ShortLinear"]

# Of the weight's length, times its inputs: what adding up in float32 may cost, in both products.
ROUNDING = 4 * 2.0**-24
PART = 2 * COLUMNS  # rows of the weight that are copied at a time
BY_TILE = ("words", "scales", "zeros")  # tensors of a packed layer that go by tiles of its columns


class RowsLinear(nn.Linear):
    """A linear that is not packed, multiplying a few rows at the speed its weight is read."""

    isa = Isa.PLAIN

    @classmethod
    def of(cls, linear: nn.Linear, isa: Isa) -> RowsLinear:
        """Take over a linear's weight, which is shared and not copied."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight, made.isa = linear.weight, isa
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Multiply: x [..., in_features] -> [..., out_features]."""
        x, weight = input, self.weight
        rows = x.numel() // self.in_features
        if not 0 < rows <= MOST_TOKENS or not self._takes(x):
            return super().forward(x)
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        failed = load_library().gptq_rows(
            weight.data_ptr(), x.data_ptr(), out.data_ptr(), rows, self.in_features,
            self.out_features, TYPES[x.dtype], self.isa, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            return super().forward(x)
        return out

    def _takes(self, x: torch.Tensor) -> bool:
        weight = self.weight
        plain = weight.is_contiguous() and weight.device.type == x.device.type == "cpu"
        same = weight.dtype == x.dtype and x.dtype in TYPES
        return plain and same and not torch.is_grad_enabled()


class ShortLinear(RowsLinear):
    """A head that gives its greatest logits without reading all of its weight.

    Attributes:
        narrow: the weight in 8 bits; no part of the model, which does not save it.
        errors: float32 [out_features], what a unit of x may be off by, by that copy.
        longest: the length of the weight's longest row.
        taken: the bytes that these take.
    """

    narrow: NativeLinear
    errors: torch.Tensor

    @classmethod
    def of(cls, linear: nn.Linear, isa: Isa) -> ShortLinear:
        """Take over a linear's weight, and copy it in 8 bits."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight, made.isa = linear.weight, isa
        made._copy()
        return made

    def _copy(self) -> None:
        """Copy the weight in 8 bits, some tiles at a time: a load must not take much more."""
        weight = self.weight.detach()
        self.errors, self.longest = torch.empty(self.out_features), 0.0
        narrow, whole = None, {}
        for first in range(0, self.out_features, PART):
            rows = weight[first : first + PART]
            packed = quantize_rows(rows, scales_dtype=torch.float32)
            part = NativeLinear(
                packed, in_features=self.in_features, out_features=len(rows), isa=self.isa
            )
            narrow = narrow or part
            for name in BY_TILE:
                tiles: torch.Tensor = getattr(part, name)
                if name not in whole:
                    count = -(-self.out_features // COLUMNS)
                    whole[name] = torch.empty(count, *tiles.shape[1:], dtype=tiles.dtype)
                whole[name][first // COLUMNS :][: len(tiles)] = tiles
            exact = rows.float()
            length = exact.norm(dim=1)
            self.longest = max(self.longest, float(length.max()))
            # In the narrow product codes of up to 255 are added up before 128 is taken off.
            slack = ROUNDING * self.in_features * (length + 2 * exact.abs().amax(dim=1))
            off = packed.dequantize().sub_(exact).norm(dim=1)
            self.errors[first : first + PART] = off * (1 + 1e-5) + slack
        assert narrow is not None
        for name, tensor in whole.items():
            setattr(narrow, name, tensor)
        narrow.out_features = self.out_features
        self.__dict__["narrow"] = narrow
        self._copied = self._state()
        self.taken = self.errors.nbytes + sum(it.nbytes for it in narrow.buffers())

    def likeliest(
        self, states: torch.Tensor, wanted: Sequence[int], aside: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Give each row's greatest logits, and minus infinity in place of some others.

        Args:
            states: x [rows, in_features].
            wanted: how many of each row's logits are to be there, those that tie with the last too.
            aside: bool [rows, out_features], tokens that do not count among these; their logits
                are there where they are as great.

        Returns:
            The logits [rows, out_features], or None where this cannot be done.
        """
        if not self._takes(states) or self._copied != self._state():
            return None
        if max(wanted) * COLUMNS > self.out_features:
            return None
        x = states.contiguous()
        counts = torch.tensor(wanted)
        out = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        failed = load_library().gptq_likeliest(
            ctypes.addressof(self.narrow.filled()), self.errors.data_ptr(), self.longest,
            self.weight.data_ptr(), x.data_ptr(), len(wanted), counts.data_ptr(),
            None if aside is None else aside.data_ptr(), out.data_ptr(), TYPES[x.dtype], self.isa,
            torch.get_num_threads(),
        )  # fmt: skip
        return None if failed else out

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and copy the weight again: it is another one now."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._copy()

    def _state(self) -> tuple[int, int]:
        """Give what changes with the weight."""
        return self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version  # noqa: SLF001 - torch has no other name for it
