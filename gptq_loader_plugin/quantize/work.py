"""Quantise the linears of a model's blocks, and say how far it has come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.model.linears import is_transposed, linear_shape
from gptq_loader_plugin.quantize.algorithm import QuantizedWeight, quantize_weight
from gptq_loader_plugin.quantize.blocks import linears
from gptq_loader_plugin.quantize.hessians import LinearOutputs, hessians, subsets
from gptq_loader_plugin.quantize.rounding import tune_block
from gptq_loader_plugin.quantize.time_left import TimeLeft, say_left

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from gptq_loader_plugin.quantize.blocks import Block, Call
    from gptq_loader_plugin.quantize.widths import Widths

__all__ = ["Work", "weight_of"]


class Work:
    """Quantise blocks, and say how far it has come.

    Args:
        widths: how each layer is quantised.
        progress: called with the layers done.
        blocks: all blocks.
        tokens: how many all samples have.
    """

    def __init__(
        self,
        widths: Widths,
        progress: Callable[[Progress], None],
        blocks: Sequence[Block],
        *,
        tokens: int,
    ) -> None:
        self._widths = widths
        self._progress = progress
        of_blocks = [linears(block) for block in blocks]
        self._total = sum(len(modules) for modules in of_blocks)
        self._done = 0
        costs = {
            name: _cost(module, tokens) for modules in of_blocks for name, module in modules.items()
        }
        self._time = TimeLeft(costs)

    @property
    def tunes(self) -> bool:
        """Whether blocks are tuned as a whole."""
        return self._widths.base.effort == "best"

    def quantize_block(
        self,
        block: Block,
        hidden: Sequence[torch.Tensor],
        calls: Sequence[Call],
        outputs: LinearOutputs,
        targets: Sequence[torch.Tensor] = (),
    ) -> dict[str, QuantizedWeight]:
        """Quantise a block by what goes through it.

        Args:
            block: the block; its weights become the quantised ones.
            hidden: its input, a batch each.
            calls: what it is called with besides, a batch each.
            outputs: of its linears that are finished.
            targets: what the unquantised model has behind the block, where it is to be tuned.
        """
        self._time.begin()
        modules = linears(block)
        before = {name: weight_of(it).clone() for name, it in modules.items()} if targets else {}
        groups = subsets(block, hidden[0], calls[0])
        if not self._widths.base.true_sequential:
            groups = [[name for names in groups for name in names]]
        quantized: dict[str, QuantizedWeight] = {}
        for together in groups:
            sums = hessians(block, together, hidden, calls, outputs)
            for names in self._alike(together, sums):
                quantized |= self.quantize_linears(modules, names, sums[names[0]])
                outputs.finish(names)
        if targets:
            outputs.forget()
            bits = {name: self._widths.of(name).bits for name in quantized}
            return tune_block(block, modules, quantized, before, hidden, targets, calls, bits=bits)
        return quantized

    def quantize_linears(
        self, modules: Mapping[str, nn.Module], names: Sequence[str], hessian: torch.Tensor
    ) -> dict[str, QuantizedWeight]:
        """Quantise linears of one input and width as one; their weights become the quantised ones.

        Args:
            modules: the linears of their block, by their path in the model.
            names: which of them.
            hessian: the mean of x xᵀ over that input, float32 [K, K].
        """
        weights = [weight_of(modules[name]) for name in names]
        whole = quantize_weight(torch.cat(weights), hessian, self._widths.of(names[0]))
        parts = whole.split([len(weight) for weight in weights])
        for name, part in zip(names, parts, strict=True):
            _set_weight(modules[name], part.dequantize())
        self._time.finish(names)
        self._report(len(names), names[-1])
        return dict(zip(names, parts, strict=True))

    def same_width(self, names: Sequence[str]) -> list[list[str]]:
        """Group layers that are quantised alike."""
        groups: dict[Any, list[str]] = {}
        for name in names:
            groups.setdefault(self._widths.layers.get(name), []).append(name)
        return list(groups.values())

    def _alike(self, names: Sequence[str], sums: dict[str, torch.Tensor]) -> list[list[str]]:
        """Group names of the same Hessian and width: their weights are quantised as one."""
        groups: list[list[str]] = []
        for name in names:
            for group in groups:
                if torch.equal(sums[group[0]], sums[name]):
                    group.append(name)
                    break
            else:
                groups.append([name])
        return [alike for group in groups for alike in self.same_width(group)]

    def apply(self, block: Block, done: dict[str, QuantizedWeight]) -> None:
        """Set a block's quantised weights, where another run has made them."""
        self.set_weights(block, done)
        if self._time.skip(list(done)):
            self._report(len(done), block.path)

    def set_weights(self, block: Block, done: Mapping[str, QuantizedWeight]) -> None:
        """Set a block's quantised weights, by their linears' paths in the model."""
        modules = linears(block)
        for name, part in done.items():
            _set_weight(modules[name], part.dequantize())

    def finish_block(self) -> None:
        """Note that a block is done, with what comes after its layers: the next one's input."""
        self._time.finish_block()

    def _report(self, layers: int, name: str) -> None:
        self._done += layers
        detail = name
        seconds = self._time.left()
        if seconds is not None:
            detail = f"{name}, {say_left(seconds)}"
        self._progress(Progress("quantize", self._done, self._total, "layers", detail))


def _cost(module: nn.Module, tokens: int) -> int:
    """Count the multiplications that a linear takes, by and large."""
    rows, columns = linear_shape(module) or (0, 0)
    return rows * (rows * (rows + columns) + tokens * (rows + columns))


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return a linear's weight as float32 [N, K]; GPT-2's Conv1D keeps it transposed."""
    weight: Any = module.weight
    tensor: torch.Tensor = weight.detach().float()
    return tensor.t().contiguous() if is_transposed(module) else tensor


def _set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    target: Any = module.weight
    target.data = (weight.t() if is_transposed(module) else weight).to(target.dtype)
