"""Quantise all blocks of a model, one after the other or all at once, keeping each finished one."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from gptq_loader_plugin.quantize.blocks import linears, record_calls, run_block
from gptq_loader_plugin.quantize.hessians import LinearOutputs
from gptq_loader_plugin.quantize.rounding import PlainStates
from gptq_loader_plugin.quantize.states import States
from gptq_loader_plugin.quantize.whole_decoder import decoder_hessians, input_groups

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from gptq_loader_plugin.quantize.algorithm import QuantizedWeight
    from gptq_loader_plugin.quantize.blocks import Block, Call
    from gptq_loader_plugin.quantize.kept_blocks import KeptBlocks
    from gptq_loader_plugin.quantize.streamed import StreamedWeights
    from gptq_loader_plugin.quantize.work import Work

__all__ = ["SHORT", "at_once", "by_blocks"]

SHORT = 16  # tokens of a sample by which is found how a model runs


def by_blocks(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Sequence[torch.Tensor],
    work: Work,
    kept: KeptBlocks,
    *,
    spill: Path | None,
    weights: StreamedWeights | None,
) -> Iterator[tuple[int, str, QuantizedWeight]]:
    """Quantise block after block, each by what the quantised ones before it hand on.

    Args:
        model: the model.
        blocks: its blocks.
        batches: int64 [samples, tokens] each.
        work: quantises them.
        kept: where finished ones are.
        spill: the folder for hidden states; None keeps them in memory.
        weights: the model's, where they are streamed.

    Yields:
        The number of a block, and a layer of it by its path.
    """
    hidden, calls = record_calls(model, blocks, batches, States(spill and spill / "states"))
    if weights is not None:
        weights.release()
    plain = None
    if work.tunes:
        plain = PlainStates(hidden.copy(spill and spill / "plain-states"), calls)
    for i, block in enumerate(blocks):
        with nullcontext() if weights is None else weights.held(block.path):
            targets = plain.advance(block, i) if plain is not None else []
            done = _one_block(i, block, hidden, calls, targets, work, kept)
        if weights is not None:
            weights.change(block.path, partial(_read_again, work, kept, i, block))
        for path, weight in done.items():
            yield i, path, weight
        del done  # or it stays while the next block is quantised


def _one_block(
    i: int,
    block: Block,
    hidden: States,
    calls: list[list[Call]],
    targets: Sequence[torch.Tensor],
    work: Work,
    kept: KeptBlocks,
) -> dict[str, QuantizedWeight]:
    """Quantise a block, or read what an earlier run has made of it; and go on to the next one."""
    with LinearOutputs(block) as outputs:
        done = kept.read(i)
        if done is None:
            done = work.quantize_block(block, hidden, calls[i], outputs, targets)
            kept.write(i, done)
        else:
            work.apply(block, done)
        if i + 1 < len(calls):
            for j, (states, call) in enumerate(zip(hidden, calls[i], strict=True)):
                outputs.start(j)
                hidden[j], output = run_block(block, states, call)
                calls[i + 1][j] = calls[i + 1][j].after(output)
    calls[i].clear()
    work.finish_block()
    return done


def _read_again(work: Work, kept: KeptBlocks, i: int, block: Block) -> None:
    """Set a block's quantised weights once more."""
    work.set_weights(block, kept.read(i) or {})


def at_once(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Sequence[torch.Tensor],
    work: Work,
    kept: KeptBlocks,
) -> Iterator[tuple[int, str, QuantizedWeight]]:
    """Quantise all blocks by what goes through them while none of them is quantised."""
    before = [kept.read(i) for i in range(len(blocks))]
    missing = [block for block, done in zip(blocks, before, strict=True) if done is None]
    groups = input_groups(model, missing, batches[0][:1, :SHORT])
    modules = {path: linear for block in missing for path, linear in linears(block).items()}
    firsts = {names[0]: modules[names[0]] for of_block in groups for names in of_block}
    sums = decoder_hessians(model, firsts, batches)
    of_missing = iter(groups)
    for i, block in enumerate(blocks):
        done = before[i]
        if done is not None:
            work.apply(block, done)
        else:
            done = {}
            for names in next(of_missing):
                hessian = sums.pop(names[0])
                for alike in work.same_width(names):
                    done |= work.quantize_linears(modules, alike, hessian)
            kept.write(i, done)
        for path, weight in done.items():
            yield i, path, weight
