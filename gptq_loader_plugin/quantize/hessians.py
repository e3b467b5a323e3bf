"""What a block's linears are calibrated by: their inputs, summed up over passes of the block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from gptq_loader_plugin.model.linears import linear_shape
from gptq_loader_plugin.quantize.blocks import StopForwardError, linears, run_block

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from gptq_loader_plugin.quantize.blocks import Block, Call

__all__ = ["LinearOutputs", "hessians", "subsets"]

OUTPUT_BYTES = 1 << 29  # of linears' outputs that are kept while a block is quantised


@torch.inference_mode()
def subsets(block: Block, hidden: torch.Tensor, call: Call) -> list[list[str]]:
    """Group a block's linears by the input they share, in the order they are first called.

    Args:
        block: the block.
        hidden: a batch of hidden states.
        call: what the block is called with.
    """
    groups: list[list[str]] = []
    inputs: list[torch.Tensor] = []  # kept, so that no other tensor can take their place in memory

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if any(name in names for names in groups):
                return  # it is called again: it is quantised by what it reads first
            x = arguments[0]
            for names, group_input in zip(groups, inputs, strict=True):
                if group_input is x:
                    names.append(name)
                    return
            groups.append([name])
            inputs.append(x)

        return hook

    modules = linears(block)
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        run_block(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    never_called = [[name] for name in modules if not any(name in names for names in groups)]
    return groups + never_called


class LinearOutputs:
    """What a block's finished linears return for each batch, computed once and not in every pass.

    Each subset of linears is calibrated on a pass of its own, by the quantised weights of those
    before it, and another pass makes the next block's input. A finished linear's input is the same
    in all of them. A context manager: the linears are their own again after it.

    Args:
        block: the block.
        limit: how many bytes to keep; what is beyond them is computed again.
    """

    def __init__(self, block: Block, limit: int = OUTPUT_BYTES) -> None:
        self._modules = linears(block)
        self._left = limit
        self._kept: dict[tuple[str, int], torch.Tensor] = {}
        self._replaced: list[Any] = []
        self._batch = 0
        self._called: set[str] = set()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let every linear compute again."""
        self.forget()

    def forget(self) -> None:
        """Let every linear compute again: their weights change after all."""
        for module in self._replaced:
            vars(module).pop("forward", None)
        self._replaced.clear()
        self._kept.clear()

    def start(self, batch: int) -> None:
        """Begin a pass of a batch, by its number."""
        self._batch = batch
        self._called.clear()

    def finish(self, names: Sequence[str]) -> None:
        """Keep what linears return from now on: their weights do not change any more."""
        for name in names:
            module: Any = self._modules[name]
            module.forward = self._kept_forward(name, module.forward)
            self._replaced.append(module)

    def _kept_forward(
        self, name: str, forward: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def kept(x: torch.Tensor) -> torch.Tensor:
            if name in self._called:  # a second call's input may come from linears after it
                return forward(x)
            self._called.add(name)
            key = (name, self._batch)
            if key in self._kept:
                return self._kept[key].clone()  # the block may change it in place
            output = forward(x)
            if output.nbytes <= self._left:
                self._left -= output.nbytes
                self._kept[key] = output.clone()
            return output

        return kept


@torch.inference_mode()
def hessians(
    block: Block,
    names: Sequence[str],
    hidden: Sequence[torch.Tensor],
    calls: Sequence[Call],
    outputs: LinearOutputs,
) -> dict[str, torch.Tensor]:
    """Sum up the inputs of linears: the mean of x xᵀ, float32 [K, K], by the module's path.

    A forward pass stops once all of them have been called, so early layers cost little.

    Args:
        block: the block.
        names: the linears, by their path in the model.
        hidden: the block's input, a batch each.
        calls: what the block is called with besides, a batch each.
        outputs: of the linears that are finished.
    """
    modules = linears(block)
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(names, 0)
    waiting: set[str] = set()
    latest: dict[str, Any] = {"input": None}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if latest["input"] is not arguments[0]:  # else it shares the input of the one before
                x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
                latest.update(input=arguments[0], tokens=x.shape[0], product=x.t() @ x)
            counts[name] += latest["tokens"]
            product = latest["product"]
            sums[name] = sums[name] + product if name in sums else product
            waiting.discard(name)
            if not waiting and not separate:
                raise StopForwardError

        return hook

    separate = any(".experts." in name for name in names)  # which are called depends on the tokens
    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        for i, (states, call) in enumerate(zip(hidden, calls, strict=True)):
            waiting.update(names)
            outputs.start(i)
            try:
                run_block(block, states, call)
            except StopForwardError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    for name in names:  # an expert no token went to is rounded as it is
        shape = linear_shape(modules[name]) or (0, 0)
        sums.setdefault(name, torch.eye(shape[0]))
    return {name: total / max(counts[name], 1) for name, total in sums.items()}
