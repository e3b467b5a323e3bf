"""Choose the widths of a model's layers for a size, tell what it comes to, and keep the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.quantize.blocks import linears
from gptq_loader_plugin.quantize.budget import Budget, Layers
from gptq_loader_plugin.quantize.sensitivity import sensitivity
from gptq_loader_plugin.quantize.widths import Widths
from gptq_loader_plugin.quantize.writer import layer_names, plain_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.quantize.blocks import Block
    from gptq_loader_plugin.quantize.kept_blocks import KeptBlocks
    from gptq_loader_plugin.quantize.options import QuantizeOptions

__all__ = ["MixedWidths"]


class MixedWidths:
    """The widths of a model's layers that fit a size best.

    Args:
        model: the model, not quantised yet.
        blocks: its blocks.
        names: from `hub_names`.
        options: `size` and `widths`.
        tell: called with a line that says what the size comes to.
        progress: called with what is weighed.

    Raises:
        OptionInvalid: `size` is none.
        QuantizeError: no choice of widths meets it, or every one does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        names: Mapping[str, str],
        options: QuantizeOptions,
        tell: Callable[[str], None],
        progress: Callable[[Progress], None],
    ) -> None:
        self._model, self._blocks, self._options = model, blocks, options
        self._tell, self._progress = tell, progress
        modules = {path: linear for block in blocks for path, linear in linears(block).items()}
        plain = plain_sizes(model, modules, names)
        self._layers = Layers(modules, layer_names(names), options, plain=plain)
        self._budget = Budget.parse(options.size or "")
        self._layers.check(self._budget)

    def choose(
        self, kept: KeptBlocks, batches: Sequence[torch.Tensor], *, by_blocks: bool
    ) -> Widths:
        """Choose them, or read what an interrupted run has chosen.

        Args:
            kept: where the choice is kept.
            batches: the calibration, int64 [samples, tokens] each.
            by_blocks: whether the blocks run one after the other.
        """
        stored = kept.read_widths()
        if stored:
            widths = Widths.chosen(self._options, stored)
        else:
            errors = sensitivity(
                self._model,
                self._blocks,
                batches,
                self._options,
                self._layers.candidates,
                by_blocks=by_blocks,
                progress=self._progress,
            )
            widths = self._layers.choose(self._budget, errors)
            kept.write_widths(widths.layers)
        self._tell(self._layers.describe(widths))
        return widths
