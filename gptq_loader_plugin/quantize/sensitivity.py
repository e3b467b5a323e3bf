"""How much the model's answers change by each width of each layer, found before any is quantised.

Where the layers' outputs change a little, the Kullback-Leibler divergence of the model's
probabilities grows by half of Fisher's quadratic form. Of that, what belongs to one output n of
one layer is kept (as K-FAC does, Martens and Grosse 2015, arXiv:1503.05671; GuidedQuant, Kim et
al. 2025, arXiv:2505.07004, quantises by the same weights):

    KL ~ 1/2 * sum over layers and their outputs n of  f_n * d_n' H d_n,    f_n = E[g_n²]

with H the mean of x x' over the layer's inputs, d_n what rounding changes row n of its weight by,
and g_n the gradient, with respect to output n, of the cross-entropy of a token that is drawn from
the model's own probabilities. d_n' H d_n is what GPTQ makes small: `error_costs` and the search of
scales forecast it for each width, from a share of the rows. One backward pass over a few thousand
tokens and one forward pass are all that it takes.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.errors import QuantizeError, is_out_of_memory
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.model.linears import linear_shape
from gptq_loader_plugin.quantize.algorithm import error_costs
from gptq_loader_plugin.quantize.blocks import linears, record_calls, run_block
from gptq_loader_plugin.quantize.hessians import LinearOutputs, hessians, subsets
from gptq_loader_plugin.quantize.quantize_blocks import SHORT
from gptq_loader_plugin.quantize.scales import least_errors
from gptq_loader_plugin.quantize.whole_decoder import decoder_hessians, input_groups
from gptq_loader_plugin.quantize.work import weight_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from gptq_loader_plugin.quantize.blocks import Block
    from gptq_loader_plugin.quantize.options import QuantizeOptions
    from gptq_loader_plugin.quantize.widths import Width

__all__ = ["Errors", "sensitivity"]

# Means over so many tokens; more would cost time, and a layer's rank is what counts.
BACKWARD_TOKENS, WINDOW = 2048, 256  # in all, and of one backward pass
FORWARD_TOKENS = 8192
ROWS = 64  # outputs of a layer that are looked at

Errors = dict[str, "dict[Width, float]"]


@torch.inference_mode()
def sensitivity(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Sequence[torch.Tensor],
    options: QuantizeOptions,
    candidates: Mapping[str, Sequence[Width]],
    *,
    by_blocks: bool,
    progress: Callable[[Progress], None],
) -> Errors:
    """Forecast what each width of each layer adds to the model's divergence, in nats a token.

    Args:
        model: the model, not quantised yet; its weights stay.
        blocks: its blocks.
        batches: the calibration, int64 [samples, tokens] each; the first of them are used.
        options: order, damping and zeros.
        candidates: the widths to try of each layer, by its path in the model.
        by_blocks: whether its blocks run one after the other.
        progress: called with the backward passes, then with the blocks done.

    Returns:
        The divergence by width, by the layer's path. Only their ratios are to be relied on.

    Raises:
        QuantizeError: the model cannot be run backwards, or its activations are not finite.
    """
    modules = {path: linear for block in blocks for path, linear in linears(block).items()}
    slopes = _squared_gradients(model, modules, batches, progress)
    few = _first(batches, FORWARD_TOKENS)
    inputs = _inputs_by_blocks if by_blocks else _inputs_at_once
    errors: Errors = {}
    for done, names, hessian in inputs(model, blocks, few):
        costs = error_costs(hessian, options)
        for name in names:
            weight, slope = weight_of(modules[name]), slopes[name]
            errors[name] = {
                width: _error(weight, slope, costs, options, width) for width in candidates[name]
            }
        progress(Progress("weigh layers", done, len(blocks), "blocks", names[-1]))
    return errors


def _error(
    weight: torch.Tensor,
    slope: torch.Tensor,
    costs: torch.Tensor,
    options: QuantizeOptions,
    width: Width,
) -> float:
    """Forecast one width of one weight [N, K] from a share of its rows."""
    rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long()
    size = weight.shape[1] if width.group_size < 0 else width.group_size
    fields = options.model_copy(update=width._asdict())
    lost = least_errors(weight[rows].t().contiguous(), costs, size, fields)
    # A ratio: where the rows that are looked at weigh more than others, it is not taken for all.
    share = slope[rows].sum()
    return float(0.5 * (lost @ slope[rows]) / share * slope.sum()) if share > 0 else 0.0


def _inputs_by_blocks(
    model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[torch.Tensor]
) -> Iterator[tuple[int, list[str], torch.Tensor]]:
    """Return the blocks done, linears that share their input, and its Hessian, block by block."""
    hidden, calls = record_calls(model, blocks, batches)
    for i, block in enumerate(blocks):
        groups = subsets(block, hidden[0], calls[i][0])
        with LinearOutputs(block, limit=0) as outputs:
            sums = hessians(block, [names[0] for names in groups], hidden, calls[i], outputs)
        for names in groups:
            yield i + 1, names, sums.pop(names[0])
        if i + 1 == len(blocks):
            break
        for j, (states, call) in enumerate(zip(hidden, calls[i], strict=True)):
            hidden[j], output = run_block(block, states, call)
            calls[i + 1][j] = calls[i + 1][j].after(output)
        calls[i].clear()


def _inputs_at_once(
    model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[torch.Tensor]
) -> Iterator[tuple[int, list[str], torch.Tensor]]:
    """Do the same by forward passes of the whole model."""
    of_blocks = input_groups(model, blocks, batches[0][:1, :SHORT])
    modules = {path: linear for block in blocks for path, linear in linears(block).items()}
    firsts = {names[0]: modules[names[0]] for groups in of_blocks for names in groups}
    sums = decoder_hessians(model, firsts, batches)
    for i, groups in enumerate(of_blocks):
        for names in groups:
            yield i + 1, names, sums.pop(names[0])


def _squared_gradients(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    batches: Sequence[torch.Tensor],
    progress: Callable[[Progress], None],
) -> dict[str, torch.Tensor]:
    """Return the mean squared gradient of each output of each linear, float32 [N], by its path."""
    windows = [part for batch in batches for row in batch for part in row.split(WINDOW)]
    windows = windows[: max(BACKWARD_TOKENS // len(windows[0]), 1)]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(mode=False), torch.enable_grad():
        sums = {path: torch.zeros((linear_shape(it) or (0, 0))[1]) for path, it in modules.items()}
        with _gradients_of(model, modules, sums):
            for done, window in enumerate(windows, 1):
                _backward(model, window.clone(), generator)
                progress(Progress("gradients", done, len(windows), "windows", ""))
    tokens = sum(len(window) for window in windows)
    return {path: total / tokens for path, total in sums.items()}


def _backward(model: PreTrainedModel, ids: torch.Tensor, generator: torch.Generator) -> None:
    """Run the cross-entropy of tokens that the model itself would write backwards."""
    try:
        log_probs = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        (-log_probs.gather(1, drawn).sum()).backward()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        words = " ".join(str(error).split())[:200]
        raise QuantizeError(
            f"a {type(model).__name__} cannot be run backwards, which tells how much each layer "
            f"matters ({words})",
            hint="give all layers one width: --bits in place of --size",
        ) from error


@contextmanager
def _gradients_of(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], sums: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Add up the squared gradients of linears' outputs in backward passes inside.

    Weights get no gradients, which would take as much memory as they do: the embedding's output is
    where the graph begins.
    """
    one = torch.ones(1, requires_grad=True)
    asked = [it for it in model.parameters() if it.requires_grad]

    def begin(_module: nn.Module, _inputs: Any, output: Any) -> Any:  # noqa: ANN401
        return output * one

    def watch(path: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def add(gradient: torch.Tensor) -> None:
            sums[path].add_(gradient.reshape(-1, gradient.shape[-1]).float().square().sum(dim=0))

        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:  # noqa: ANN401
            if output.requires_grad:
                output.register_hook(add)

        return hook

    handles = [model.get_input_embeddings().register_forward_hook(begin)]
    handles += [module.register_forward_hook(watch(path)) for path, module in modules.items()]
    for parameter in asked:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad = True
        for handle in handles:
            handle.remove()


def _first(batches: Sequence[torch.Tensor], tokens: int) -> list[torch.Tensor]:
    """Return the first batches, until there are so many tokens."""
    few: list[torch.Tensor] = []
    for batch in batches:
        if sum(it.numel() for it in few) >= tokens:
            break
        few.append(batch)
    return few
