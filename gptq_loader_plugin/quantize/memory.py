"""Foretell the memory that quantising takes, and choose what of it goes to the disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import NotEnoughMemory
from gptq_loader_plugin.model.linears import linear_shape
from gptq_loader_plugin.quantize.blocks import linears
from gptq_loader_plugin.quantize.hessians import OUTPUT_BYTES
from gptq_loader_plugin.quantize.tune_scales import recorded_bytes, tuning_bytes
from gptq_loader_plugin.system.memory import free_memory, resident_memory
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from gptq_loader_plugin.quantize.blocks import Block
    from gptq_loader_plugin.quantize.options import QuantizeOptions

__all__ = ["MemoryForecast", "Samples", "forecast_memory", "forecast_run"]

# Matrices of float32 that are alive at once, of a weight's size and of a Hessian's, by what the
# algorithm holds at its fullest: while the Hessian is factored (in float64), and while codes are
# refined. tests/unit/test_quantize_memory.py counts the tensors alive beside this.
FACTORED = 9
REFINED_WEIGHTS, REFINED_HESSIANS = 15, 4
TUNED = 9  # of a block's weights, while it is tuned as a whole
FORWARD = 6  # of a batch's widest activation


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """What quantising takes, in bytes.

    Attributes:
        held: what the process holds already: code, and the weights that are not streamed.
        block: the most that one block takes while it is quantised, with its weights.
        states: the hidden states of all calibration samples.
        tuned: what tuning all scales together takes, after the blocks; 0 where it is left out.
        on_disk: whether the hidden states go to the disk.
    """

    held: int
    block: int
    states: int
    tuned: int = 0
    on_disk: bool = False

    @property
    def peak(self) -> int:
        """The most memory that the process is to hold at any time."""
        return self.held + max(self.block + (0 if self.on_disk else self.states), self.tuned)

    def __str__(self) -> str:
        """Say it in words."""
        words = f"takes up to {write_size(self.peak)} of memory"
        if self.on_disk:
            words += f" and {write_size(self.states)} of disk for hidden states"
        return words


@dataclass(frozen=True, slots=True)
class Samples:
    """How large the calibration is.

    Attributes:
        tokens: those of all samples together.
        batch: those of one batch.
        hidden: the numbers of a token's hidden state; 0 where none are kept between blocks.
    """

    tokens: int
    batch: int
    hidden: int


def forecast_run(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    options: QuantizeOptions,
    samples: Samples,
    *,
    streamed: int,
    limit: int | None,
    tell: Callable[[str], None],
) -> MemoryForecast:
    """Foretell the peak of a whole run: scales are tuned together where there is room for it.

    For that the whole model has to be in memory.

    Args:
        model: the model.
        blocks: its blocks.
        options: how to quantise.
        samples: the calibration.
        streamed: the bytes of the largest block where weights are streamed, else none.
        limit: the most bytes to take; None takes what is free.
        tell: called with a line where there is no room for tuning.

    Raises:
        NotEnoughMemory: a block alone needs more than there is.
    """
    foretell = partial(forecast_memory, blocks, options, samples, limit=limit)
    if options.effort == "fast":
        return foretell(streamed=streamed)
    tuned = tuning_bytes(model)
    if tuned:
        whole = 4 * sum(it.numel() for it in model.parameters()) if streamed else 0
        stays = whole + recorded_bytes(model, samples.tokens)
        try:
            return foretell(streamed=0, loaded=stays, tuned=tuned)
        except NotEnoughMemory as error:
            tell(
                "The scales of all layers are not tuned together, which takes "
                f"{write_size(error.needed)} of memory: it may take {write_size(error.free)}."
            )
    else:
        tell("The scales of all layers are not tuned together: it has no output embedding.")
    return foretell(streamed=streamed)


def forecast_memory(
    blocks: Sequence[Block],
    options: QuantizeOptions,
    samples: Samples,
    *,
    streamed: int,
    loaded: int = 0,
    tuned: int = 0,
    limit: int | None = None,
) -> MemoryForecast:
    """Foretell the peak, with hidden states on the disk where they do not fit.

    Args:
        blocks: the blocks to quantise.
        options: how to quantise.
        samples: the calibration.
        streamed: the bytes of weights that are in memory beside what is held now: of one block
            where weights are streamed, else none.
        loaded: the bytes that are read before the first block, to stay.
        tuned: what tuning all scales together takes.
        limit: the most bytes to take; None takes what is free.

    Raises:
        NotEnoughMemory: a block alone needs more than there is.
    """
    states = 4 * samples.tokens * samples.hidden * (2 if options.effort == "best" else 1)
    block = streamed + max(_block_bytes(block, options, samples) for block in blocks)
    now = resident_memory()
    most = now + free_memory() if limit is None else min(limit, now + free_memory())
    held = now + loaded
    on_disk = held + block + states > most
    forecast = MemoryForecast(held, block, states, tuned, on_disk)
    if forecast.peak > most:
        raise NotEnoughMemory(
            f"quantising {forecast}, even block by block, and may take {write_size(most)}",
            needed=forecast.peak,
            free=most,
            hint="free some memory, allow more with --max-memory, or take a smaller --effort",
        )
    return forecast


def _block_bytes(block: Block, options: QuantizeOptions, samples: Samples) -> int:
    """Count what a block takes while it is quantised, its own weights left out."""
    stacked: dict[tuple[str, int], int] = {}
    sums = weights = outputs = widest = 0
    for path, module in linears(block).items():
        rows, columns = linear_shape(module) or (0, 0)
        key = path.rpartition(".")[0], rows
        stacked[key] = stacked.get(key, 0) + columns
        weights += rows * columns
        outputs += 4 * samples.tokens * columns
        widest = max(widest, rows, columns)
        sums += 4 * rows * rows if ".experts." in path else 0
    layer = 0
    for (_, rows), columns in stacked.items():
        square, weight = 4 * rows * rows, 4 * rows * columns
        refined = REFINED_WEIGHTS * weight + REFINED_HESSIANS * square
        layer = max(layer, FACTORED * square + 2 * weight, refined)
    forward = 4 * samples.batch * widest * FORWARD
    tuned = TUNED * 4 * weights if options.effort == "best" else 0
    return max(layer + min(outputs, OUTPUT_BYTES), tuned) + 2 * sums + forward
