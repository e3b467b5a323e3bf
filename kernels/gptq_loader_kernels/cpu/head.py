"""A model's head through the native library: all logits, or exactly the top ones; imports torch."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from gptq_loader_kernels.cpu.decoder import MAX_STEP_TOKENS
from gptq_loader_kernels.cpu.library import (
    COLUMNS,
    Activations,
    Isa,
    Linear,
    choose_code,
    load_library,
)
from gptq_loader_kernels.cpu.linear import TYPES
from gptq_loader_kernels.cpu.memory import empty
from gptq_loader_kernels.cpu.tensors import check_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RowsLinear", "TopLogitsLinear"]

GROUP_SIZE, ZERO = 64, 128  # of the narrow copy
SAMPLE_ROWS = 16  # of the weight, and as many numbers of each, that are compared at each token


class RowsLinear(nn.Linear):
    """A linear that is not packed, multiplying a few rows at the speed its weight is read."""

    isa, activations = Isa.PLAIN, Activations.FLOAT32

    @classmethod
    def of(
        cls, linear: nn.Linear, isa: Isa | None = None, activations: Activations | None = None
    ) -> Self:
        """Take over a linear's weight, which is shared and not copied."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight = linear.weight
        made.isa, made.activations = choose_code(isa, activations)
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Multiply: x [..., in_features] -> [..., out_features]."""
        x, weight = input, self.weight
        rows = x.numel() // self.in_features
        if not 0 < rows <= MAX_STEP_TOKENS or not self._takes(x):
            return super().forward(x)  # torch has its own words for what does not fit
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        failed = load_library().gptq_head(
            weight.data_ptr(), x.data_ptr(), out.data_ptr(), rows, self.in_features,
            self.out_features, TYPES[x.dtype], self.isa, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            return super().forward(x)
        return out

    def _takes(self, x: torch.Tensor) -> bool:
        weight = self.weight
        plain = (
            self.bias is None
            and weight.is_contiguous()
            and weight.device.type == x.device.type == "cpu"
        )
        same = weight.dtype == x.dtype and x.dtype in TYPES
        fits = weight.shape == (self.out_features, self.in_features)
        fits = fits and x.shape[-1:] == (self.in_features,)
        return plain and same and fits and not torch.is_grad_enabled()


class TopLogitsLinear(RowsLinear):
    """A head that returns its top logits without reading all of its weight.

    Attributes:
        narrow: the weight in 8 bits, as the library reads it.
        errors: float32 [out_features], what a unit of x may be off by, by that copy.
        longest: the length of the weight's longest row.
        extra_bytes: the bytes these take; they are no part of the model, which does not save them.
    """

    @classmethod
    def of(
        cls, linear: nn.Linear, isa: Isa | None = None, activations: Activations | None = None
    ) -> Self:
        """Take over a linear's weight, and copy it in 8 bits.

        Raises:
            ValueError: its inputs are no multiple of 4.
        """
        if linear.in_features % 4:
            raise ValueError(f"{linear.in_features} inputs do not fill words of 8-bit codes")
        check_tensor("weight", linear.weight, (linear.out_features, linear.in_features), *TYPES)
        made = super().of(linear, isa, activations)
        made.quantize()
        return made

    def quantize(self) -> None:
        """Copy the weight in 8 bits, as it is now."""
        weight = self.weight.detach().contiguous()
        columns, rows = weight.shape
        tiles = -(-columns // COLUMNS)
        sizes = [min(GROUP_SIZE, rows - first) for first in range(0, rows, GROUP_SIZE)]
        groups = tiles, len(sizes), COLUMNS
        # The default dtype and device are the process's: another thread's load may be changing the
        # one, and addresses on the other are none that the library can read.
        floats: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        integers: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}
        self.errors = torch.empty(columns, **floats)
        lengths = torch.empty(columns, **floats)
        self._tensors = {
            "rows": torch.arange(rows, **integers),
            "segment_units": torch.tensor(sizes, **integers) // 4,
            "segment_group": torch.arange(len(sizes), **integers),
            "words": empty(tiles, rows // 4, COLUMNS, dtype=torch.int32).zero_(),
            "scales": empty(*groups, dtype=torch.float32).zero_(),
            "zeros": empty(*groups, dtype=torch.uint8).fill_(ZERO),
        }
        places = {name: tensor.data_ptr() for name, tensor in self._tensors.items()}
        load_library().gptq_quantize_head(
            weight.data_ptr(), columns, rows, places["words"], places["scales"],
            self.errors.data_ptr(), lengths.data_ptr(), TYPES[weight.dtype], self.isa,
            torch.get_num_threads(),
        )  # fmt: skip
        self.narrow = Linear(
            bits=8, in_features=rows, out_features=columns, units=rows // 4, segments=len(sizes),
            groups=len(sizes), float_scales=True, **places,
        )  # fmt: skip
        self.longest = float(lengths.max())
        self._copied, self._sample = self._state(), self._some().clone()
        self.extra_bytes = self.errors.nbytes + sum(it.nbytes for it in self._tensors.values())

    def top_logits(
        self, states: torch.Tensor, needed: Sequence[int], excluded: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return each row's top logits, and minus infinity in place of some others.

        Args:
            states: x [rows, in_features].
            needed: how many of each row's logits must be there, those that tie with the last too.
            excluded: bool [rows, out_features], tokens that do not count among these; their logits
                are there where they are as great.

        Returns:
            The logits [rows, out_features], or None where this cannot be done.

        Raises:
            ValueError: `needed` or `excluded` is not for as many rows and columns, or wants none.
        """
        rows = states.numel() // self.in_features
        if len(needed) != rows or min(needed, default=1) < 1:
            raise ValueError(f"{[*needed]} does not say how many logits of {rows} rows are needed")
        if excluded is not None:
            check_tensor("excluded", excluded, (rows, self.out_features), torch.bool)
        if rows == 0 or not self._takes(states) or self._changed():
            return None
        if max(needed) * COLUMNS > self.out_features:
            return None
        x = states.contiguous()
        counts = (ctypes.c_int64 * len(needed))(*needed)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        failed = load_library().gptq_top_logits(
            ctypes.addressof(self.narrow), self.errors.data_ptr(), self.longest,
            self.weight.data_ptr(), x.data_ptr(), len(needed), ctypes.addressof(counts),
            None if excluded is None else excluded.data_ptr(), out.data_ptr(), TYPES[x.dtype],
            self.isa, self.activations, torch.get_num_threads(),
        )  # fmt: skip
        return None if failed else out

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what points into memory."""
        return {**self.__dict__, "narrow": None, "_tensors": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and copy the weight again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.quantize()

    def _changed(self) -> bool:
        """Return whether the weight is another one than was copied.

        What is written through `.data`, as adapters are merged, changes no version; such a change
        is one of all rows.
        """
        return self._copied != self._state() or not torch.equal(self._some(), self._sample)

    def _some(self) -> torch.Tensor:
        """Return the beginnings of some of the weight's rows."""
        step = max(self.out_features // SAMPLE_ROWS, 1)
        return self.weight.detach()[::step, :SAMPLE_ROWS]

    def _state(self) -> tuple[int, int]:
        """Give what changes with the weight."""
        return self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version  # noqa: SLF001 - torch has no other name for it
