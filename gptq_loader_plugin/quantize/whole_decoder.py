"""Calibrate all layers of a model at once, where its blocks cannot be run one after the other.

Some classes do more between two blocks than to hand states on (XLM's attention is no part of what
has its weights in a list), and some run the same blocks several times (Dory, HRM). What such a
block is calibrated with must come from forward passes of the whole model.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_plugin.errors import NotEnoughMemory, QuantizeError, is_out_of_memory
from gptq_loader_plugin.model.linears import linear_shape
from gptq_loader_plugin.quantize.blocks import (
    Block,
    blocks_of,
    linears,
    record_calls,
    run_block,
    states_of,
)
from gptq_loader_plugin.system.memory import free_memory
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

__all__ = ["decoder_blocks", "decoder_hessians", "input_groups", "runs_by_blocks"]

# Of the states after the last block, by the relative root-mean-square: the same products in the
# same order are the same bits, and a block that is fed wrongly is off by some 1.
TOLERANCE = 1e-4


@torch.inference_mode()
def runs_by_blocks(model: PreTrainedModel, blocks: Sequence[Block], ids: torch.Tensor) -> bool:
    """Whether running block after block gives the states that the model's own forward gives.

    Args:
        model: the model, not quantised yet.
        blocks: its blocks.
        ids: a short sample, int64 [1, tokens].
    """
    last: list[torch.Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:  # noqa: ANN401 - a block's own
        last[:] = [states_of(output).clone()]  # the model may change them in place

    handle = blocks[-1].module.register_forward_hook(note)
    try:
        _forward(model, ids)
    finally:
        handle.remove()
    try:
        walked = _walk(model, blocks, ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    if walked is None or not last:
        return False
    off = (walked - last[0]).norm() / last[0].norm().clamp_min(1e-12)
    return bool(off <= TOLERANCE)


def _walk(
    model: PreTrainedModel, blocks: Sequence[Block], ids: torch.Tensor
) -> torch.Tensor | None:
    """Run block after block; None where a block is called more than once, or never."""
    (hidden, *_), calls = record_calls(model, blocks, [ids])
    if any(len(of_block) != 1 for of_block in calls):
        return None
    output = None
    for block, (call,) in zip(blocks, calls, strict=True):
        hidden, output = run_block(block, hidden, call.after(output))
    return hidden


@torch.inference_mode()
def decoder_blocks(model: PreTrainedModel, ids: torch.Tensor, bits: int = 4) -> list[Block]:
    """List the members of all lists of modules that a text goes through, as blocks.

    Args:
        model: the model.
        ids: a short sample, int64 [1, tokens].
        bits: the width the codes are to have.

    Raises:
        QuantizeError: there are none.
    """
    called: set[nn.Module] = set()
    every = {path: it for path, it in model.named_modules() if linear_shape(it) is not None}
    with _watching(every, lambda _: lambda module, _: called.add(module)):
        _forward(model, ids)
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not called.isdisjoint(module.modules()):
            inside = any(path.startswith(f"{outer}.") for outer in lists)
            if not inside:
                lists[path] = module
    if not lists:
        message = f"a {model.config.model_type} model has no list of blocks to quantise"
        raise QuantizeError(message, hint="quantise a decoder-only language model")
    return blocks_of(lists, bits)


@torch.inference_mode()
def input_groups(
    model: PreTrainedModel, blocks: Sequence[Block], ids: torch.Tensor
) -> list[list[list[str]]]:
    """Group the linears of each block by the inputs they share in every one of their calls.

    Args:
        model: the model.
        blocks: blocks of it.
        ids: a short sample, int64 [1, tokens].
    """
    of_blocks = [linears(block) for block in blocks]
    inputs: dict[str, list[torch.Tensor]] = {name: [] for of in of_blocks for name in of}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, arguments: inputs[name].append(arguments[0])

    with _watching({name: module for of in of_blocks for name, module in of.items()}, watch):
        _forward(model, ids)
    return [_same_inputs({name: inputs[name] for name in of}) for of in of_blocks]


def _same_inputs(inputs: Mapping[str, Sequence[torch.Tensor]]) -> list[list[str]]:
    groups: dict[tuple[int, ...] | str, list[str]] = {}
    for name, seen in inputs.items():  # an expert that no token went to shares its input with none
        groups.setdefault(tuple(id(x) for x in seen) or name, []).append(name)
    return list(groups.values())


@torch.inference_mode()
def decoder_hessians(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    batches: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Sum up the inputs of linears in forward passes of the whole model, as `hessians` does.

    Args:
        model: the model, not quantised yet.
        modules: one linear of each group that shares its inputs, by its path.
        batches: int64 [samples, tokens] each.

    Raises:
        NotEnoughMemory: there is too little for all sums at once.
    """
    sizes = {path: (linear_shape(module) or (0, 0))[0] for path, module in modules.items()}
    _check_memory(model, sum(4 * size * size for size in sizes.values()))
    sums = {path: torch.zeros(size, size) for path, size in sizes.items()}
    counts = dict.fromkeys(sizes, 0)

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].reshape(-1, sizes[path]).float()
            sums[path].addmm_(x.t(), x)
            counts[path] += len(x)

        return hook

    with _watching(modules, watch):
        for batch in batches if modules else ():
            _forward(model, batch)
    for path, count in counts.items():
        if count:
            sums[path] /= count
        else:  # an expert no token went to is rounded as it is
            sums[path].fill_diagonal_(1)
    return sums


def _check_memory(model: PreTrainedModel, needed: int) -> None:
    free = free_memory()
    if needed > free:
        raise NotEnoughMemory(
            f"the blocks of a {type(model).__name__} do not run one after the other: to calibrate "
            f"all its layers at once takes {write_size(needed)} of memory beside the model, and "
            f"{write_size(free)} is free",
            needed=needed,
            free=free,
            hint="free some memory, or quantise it on a machine with more",
        )


@contextmanager
def _watching(
    modules: Mapping[str, nn.Module],
    watch: Callable[[str], Callable[[nn.Module, tuple[Any, ...]], None]],
) -> Iterator[None]:
    """Have what `watch` makes for each path see the inputs of that module, inside."""
    handles = [module.register_forward_pre_hook(watch(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
