"""Tune a block's codes and scales together, by the signs of gradients.

GPTQ and `refine` look at one layer at a time. Here the whole block counts: what it hands on with
quantised weights is to be what the unquantised model has there, in the mean square,

    min over V, F of  || block(x~; Q(V, F)) - y ||²,   Q = (round(C + V) - zero) * S (1 + F)

where x~ is the input as the quantised blocks before it make it, and y what the unquantised block
makes of the unquantised input. It is AutoRound's method (SignRound, Cheng et al. 2023,
arXiv:2309.05516): the gradient passes through the rounding as if it were not there, and each step
moves every number by the same amount, against the sign of its gradient; the amounts fall linearly
to zero. Other than AutoRound, which starts from the nearest codes, it starts from GPTQ's codes C
and refined scales S; V begins a part of the way from each code towards the unquantised weight, so
that codes which were close to another one are the first to move.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from gptq_loader_plugin.model.linears import is_transposed
from gptq_loader_plugin.quantize.blocks import Call, call_block, run_block

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gptq_loader_plugin.quantize.algorithm import QuantizedWeight
    from gptq_loader_plugin.quantize.blocks import Block
    from gptq_loader_plugin.quantize.states import States

__all__ = ["PlainStates", "tune_block"]

TOWARDS, FARTHEST = (
    0.9,
    0.45,
)  # how far V begins from a code: this share of the way, at the farthest
SCALE_STEP = 0.02  # what the steps of a scale add up to, as a share of it
CODE_STEP = 0.5  # and those of a code
STEPS = 60


class PlainStates:
    """The hidden states of the unquantised model, block after block.

    Args:
        hidden: the input of the first block, a batch each; changed.
        calls: what each block is called with besides: calls[block][batch].
    """

    def __init__(self, hidden: States, calls: Sequence[Sequence[Call]]) -> None:
        self._hidden = hidden
        self._calls = [list(of_block) for of_block in calls]

    def advance(self, block: Block, number: int) -> States:
        """Run a block that is not quantised yet; return what it hands on, a batch each."""
        calls = self._calls[number]
        for batch, (states, call) in enumerate(zip(self._hidden, calls, strict=True)):
            self._hidden[batch], output = run_block(block, states, call)
            if number + 1 < len(self._calls):
                after = self._calls[number + 1]
                after[batch] = after[batch].after(output)
        calls.clear()
        return self._hidden


@dataclass(slots=True)
class _Tuned:
    """What moves of one linear; all float32.

    Attributes:
        module: the linear.
        groups: the group of each row, int64 [K].
        zeros: each row's, [K, N].
        scales: GPTQ's, [G, N].
        factors: what the scales are multiplied by, less one, [G, N].
        places: codes that are not rounded yet, [K, N].
        codes: the same, rounded.
        rounded: the scales as float16 holds them.
    """

    module: Any
    groups: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor
    places: torch.Tensor
    codes: torch.Tensor
    rounded: torch.Tensor

    @classmethod
    def start(cls, module: nn.Module, weight: QuantizedWeight, before: torch.Tensor) -> _Tuned:
        """Begin at GPTQ's codes and scales.

        Args:
            module: the linear.
            weight: what GPTQ made of it.
            before: the unquantised weight, float32 [N, K].
        """
        groups, scales = weight.g_idx.long(), weight.scales.float()
        zeros, codes = weight.zeros.float()[groups], weight.codes.float()
        way = before.t() / scales[groups] + zeros - codes
        places = codes + (TOWARDS * way).clamp_(-FARTHEST, FARTHEST)
        return cls(
            module, groups, zeros, scales, torch.zeros_like(scales), places, codes, scales.clone()
        )

    def apply(self, greatest: int) -> None:
        """Round, and have the linear compute with it."""
        self.codes = self.places.round().clamp_(0, greatest)
        self.rounded = (self.scales * (1 + self.factors)).half().float()
        weight = (self.codes - self.zeros) * self.rounded[self.groups]
        transposed = is_transposed(self.module)
        self.module.weight.data = weight if transposed else weight.t().contiguous()

    def move(self, gradient: torch.Tensor, step: float, greatest: int) -> None:
        """Move everything against the sign of its gradient, by a share of the whole way."""
        slope = gradient if is_transposed(self.module) else gradient.t()
        of_scales = torch.zeros_like(self.scales)
        of_scales.index_add_(0, self.groups, slope * (self.codes - self.zeros))
        self.factors -= 2 * SCALE_STEP * step * (of_scales * self.scales).sign_()
        self.places -= 2 * CODE_STEP * step * (slope * self.rounded[self.groups]).sign_()
        self.places.clamp_(-0.49, greatest + 0.49)


def tune_block(
    block: Block,
    modules: Mapping[str, nn.Module],
    quantized: Mapping[str, QuantizedWeight],
    before: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    calls: Sequence[Call],
    *,
    bits: Mapping[str, int],
) -> dict[str, QuantizedWeight]:
    """Return better codes and scales of a block; its weights become those.

    Args:
        block: the block.
        modules: its linears.
        quantized: what GPTQ made of them.
        before: their unquantised weights, float32 [N, K].
        inputs: the block's input behind quantised blocks, a batch each.
        targets: what the unquantised block made of the unquantised input, a batch each.
        calls: what the block is called with besides, a batch each.
        bits: the width of each one's codes.
    """
    greatest = {name: (1 << bits[name]) - 1 for name in quantized}
    with torch.inference_mode(mode=False):
        # Tensors of inference mode cannot take part in a backward pass: copies can.
        tuned = {
            name: _Tuned.start(modules[name], _normal(weight), before[name].clone())
            for name, weight in quantized.items()
        }
        for name, it in tuned.items():
            it.apply(greatest[name])
            it.module.weight.requires_grad_(requires_grad=True)
        generator = torch.Generator().manual_seed(0)
        order: list[int] = []
        for step in range(STEPS):
            order = order or torch.randperm(len(inputs), generator=generator).tolist()
            batch = order.pop()
            loss = _loss(block, inputs[batch], targets[batch], calls[batch])
            weights = [it.module.weight for it in tuned.values()]
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for (name, it), gradient in zip(tuned.items(), gradients, strict=True):
                if gradient is not None:
                    it.move(gradient, (1 - step / STEPS) / STEPS, greatest[name])
                    it.apply(greatest[name])
        for it in tuned.values():
            it.module.weight.requires_grad_(requires_grad=False)
    return {
        name: replace(
            quantized[name], codes=it.codes.to(torch.uint8), scales=it.rounded.to(torch.float16)
        )
        for name, it in tuned.items()
    }


def _loss(block: Block, hidden: torch.Tensor, target: torch.Tensor, call: Call) -> torch.Tensor:
    own = Call(tree_map(_copied, call.arguments), tree_map(_copied, call.keywords), call.named)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        output, _ = call_block(block, hidden.clone(), own)
    return (output.float() - target.clone()).square().mean()


def _copied(value: Any) -> Any:  # noqa: ANN401 - a block's own argument
    return value.clone() if isinstance(value, torch.Tensor) else value


def _normal(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(
        weight,
        codes=weight.codes.clone(),
        scales=weight.scales.clone(),
        zeros=weight.zeros.clone(),
        g_idx=weight.g_idx.clone(),
    )
