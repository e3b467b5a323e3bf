"""Run a model block by block: find its blocks, and what each is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_plugin.errors import QuantizeError
from gptq_loader_plugin.kernel.packing import unfilled_words
from gptq_loader_plugin.model.experts import PackedExperts, expert_weights, experts_layout
from gptq_loader_plugin.model.linears import linear_shape
from gptq_loader_plugin.quantize.states import States

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

__all__ = [
    "FUSED_EXPERTS",
    "NOT_LINEAR",
    "Block",
    "Call",
    "StopForwardError",
    "blocks_of",
    "call_block",
    "find_blocks",
    "left_out",
    "record_calls",
    "run_block",
    "separate_experts",
    "states_of",
]

NOT_LINEAR = "no linear layer"
FUSED_EXPERTS = "all experts in one tensor"


@dataclass(frozen=True, slots=True)
class Block:
    """One of a model's blocks.

    Attributes:
        path: its path in the model.
        module: the block.
        bits: the width its codes are to have.
        shared: its linears whose weight an earlier block has too (Zamba's one attention block).
    """

    path: str
    module: nn.Module
    bits: int = 4
    shared: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Call:
    """What a block is called with, besides the hidden states.

    Attributes:
        arguments: those by their place, after the hidden states.
        keywords: those by their name.
        named: whether the hidden states are handed by their name.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    named: bool = False

    def after(self, output: Any) -> Call:  # noqa: ANN401 - a block's own
        """Return the call with what the block before answered in the places that take it."""

        def filled(value: Any) -> Any:  # noqa: ANN401
            return output[value.index] if isinstance(value, _Carried) else value

        return Call(
            tuple(filled(it) for it in self.arguments),
            {name: filled(it) for name, it in self.keywords.items()},
            self.named,
        )


@dataclass(frozen=True, slots=True)
class _Carried:
    """Stands in a call for what the block before answers, at this index: Zaya's router states."""

    index: int


class StopForwardError(Exception):
    """Raised by a hook that has seen enough of a forward pass."""


def find_blocks(model: PreTrainedModel, bits: int = 4) -> list[Block]:
    """Find the list of modules that holds most of the model's weights: its blocks, in order.

    Args:
        model: the model.
        bits: the width the codes are to have.

    Raises:
        QuantizeError: there is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in _block_lists(model):
        weights = sum(parameter.numel() for parameter in module.parameters())
        if best is None or weights > best[0]:
            best = (weights, path, module)
    if best is None:
        message = f"a {model.config.model_type} model has no list of blocks to quantise"
        raise QuantizeError(message, hint="quantise a decoder-only language model")
    return blocks_of({best[1]: best[2]}, bits)


def _block_lists(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """List what may be the blocks: the decoder's own lists, or any: a tower may be larger."""
    decoder = model.get_decoder()
    every = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    own = [(path, module) for path, module in every.items() if module in set(decoder.children())]
    return own or list(every.items())


def blocks_of(lists: Mapping[str, nn.ModuleList], bits: int) -> list[Block]:
    """Make blocks of all members of some lists, by the lists' paths in the model."""
    blocks: list[Block] = []
    seen: set[int] = set()
    members = [
        (f"{path}.{i}", module)
        for path, modules in lists.items()
        for i, module in enumerate(modules)
    ]
    for path, module in members:
        every = linears(Block(path, module, bits))
        weights = {name: id(linear.weight) for name, linear in every.items()}
        shared = frozenset(name for name, weight in weights.items() if weight in seen)
        seen.update(weights.values())
        blocks.append(Block(path, module, bits, shared))
    return blocks


def separate_experts(model: PreTrainedModel) -> None:
    """Replace fused experts by linears of their own, so that each is quantised by itself."""
    for path, module in list(model.named_modules()):
        layout = experts_layout(module)
        if layout is None:
            continue
        projections = [
            (expert, role, _linear(weight, bias))
            for expert, role, weight, bias in expert_weights(module, layout)
        ]
        packed = PackedExperts(module)
        for expert, role, linear in projections:
            packed.place(expert, role, linear)
        model.set_submodule(path, packed)


def linears(block: Block) -> dict[str, nn.Module]:
    """List a block's linear modules that can be quantised, by their path in the model."""
    linears = {}
    for name, module in block.module.named_modules():
        shape = linear_shape(module)
        if shape is not None and unfilled_words(shape, block.bits) is None:
            linears[f"{block.path}.{name}"] = module
    return {name: module for name, module in linears.items() if name not in block.shared}


def left_out(blocks: Sequence[Block]) -> dict[str, str]:
    """Say of each module with a weight that is not quantised why, by its path in the model."""
    left: dict[str, str] = {}
    for block in blocks:
        for name, module in block.module.named_modules():
            if ".experts." in f".{name}.":  # those that `separate_experts` leaves as they are
                fused = dict(module.named_parameters(recurse=False))
                fused.pop("weight", None)
                left |= {
                    f"{block.path}.{name}.{leaf}": FUSED_EXPERTS
                    for leaf, parameter in fused.items()
                    if parameter.dim() > 1
                }
            weight, shape = getattr(module, "weight", None), linear_shape(module)
            if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
                continue
            fault = NOT_LINEAR if shape is None else unfilled_words(shape, block.bits)
            if fault is not None:
                left[f"{block.path}.{name}"] = fault
    return left


@torch.inference_mode()
def record_calls(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    batches: Sequence[torch.Tensor],
    first: States | None = None,
) -> tuple[States, list[list[Call]]]:
    """Learn what every block is called with, without running the blocks.

    Each block is replaced by one that notes its call and hands its hidden states on; the model's
    own forward makes masks and positions, block by block.

    Args:
        model: the model.
        blocks: its blocks.
        batches: int64 [samples, tokens] each.
        first: what to collect the hidden states in; None keeps them in memory.

    Returns:
        The hidden states before the first block, a batch each; and calls[block][batch], of which
        batches share what is equal: masks and positions, mostly.
    """
    answer = _probe_output(model, blocks[0], batches[0][:1, :8])
    holder: Any = model.get_submodule(blocks[0].path.rpartition(".")[0])
    first = States() if first is None else first
    calls: list[list[Call]] = [[] for _ in blocks]
    handed: list[torch.Tensor | None] = []
    recorders = [
        _Recorder(block.module, calls[i], answer, handed) for i, block in enumerate(blocks)
    ]
    recorders[0].inputs = first
    try:
        for i, recorder in enumerate(recorders):
            holder[i] = recorder
        for batch in batches:
            handed.clear()
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    finally:
        for i, block in enumerate(blocks):
            holder[i] = block.module
    return first, calls


@torch.inference_mode()
def run_block(block: Block, hidden: torch.Tensor, call: Call) -> tuple[torch.Tensor, Any]:
    """Run one block on one batch of hidden states; return those after it, and its whole answer."""
    return call_block(block, hidden, call)


def call_block(block: Block, hidden: torch.Tensor, call: Call) -> tuple[torch.Tensor, Any]:
    """Do what `run_block` does, with gradients where they are on."""
    if call.named:
        output = block.module(hidden_states=hidden, **call.keywords)
    else:
        output = block.module(hidden, *call.arguments, **call.keywords)
    return states_of(output), output


def states_of(output: Any) -> torch.Tensor:  # noqa: ANN401 - a block's own
    """Return the hidden states of what a block answers with."""
    states: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


class _Recorder(nn.Module):
    """Stand in for a block: note the call, hand the hidden states on.

    Args:
        block: the block.
        calls: what to note calls in.
        answer: what a block answers with.
        handed: what the recorder before this one handed on, all of its answer; changed.
    """

    def __init__(
        self,
        block: nn.Module,
        calls: list[Call],
        answer: Any,  # noqa: ANN401 - a block's own
        handed: list[torch.Tensor | None],
    ) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is no submodule
        self._calls = calls
        self._answer = answer
        self._handed = handed
        self.inputs: States | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the parent asks of a block
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 - a block's own
        if arguments:
            hidden, rest = arguments[0], arguments[1:]
        else:
            hidden, rest = keywords.pop("hidden_states"), ()
        if self.inputs is not None:
            self.inputs.append(hidden)
        before = self._calls[-1] if self._calls else Call((), {})
        places = [*before.arguments, *([None] * len(rest))]
        self._calls.append(
            Call(
                tuple(_same(self._carried(it), own) for it, own in zip(rest, places, strict=False)),
                {
                    name: _same(self._carried(it), before.keywords.get(name))
                    for name, it in keywords.items()
                },
                named=not arguments,
            )
        )
        if not isinstance(self._answer, tuple | list):
            return hidden
        probed = self._answer[0].shape[:2]
        handed = [_resized(it, probed, hidden.shape[:2]) for it in self._answer]
        self._handed[:] = handed
        kind: Any = getattr(type(self._answer), "_make", tuple)  # of a named tuple
        return kind((hidden, *handed[1:]))

    def _carried(self, value: Any) -> Any:  # noqa: ANN401
        """Return a mark in place of what the recorder before this one has handed on."""
        for i, own in enumerate(self._handed):
            if i and isinstance(own, torch.Tensor) and own is value:
                return _Carried(i)
        return value


def _same(value: Any, before: Any) -> Any:  # noqa: ANN401 - a block's own argument
    """Return the batch before's tensors in place of those that are equal to them."""
    if isinstance(value, tuple) and isinstance(before, tuple) and len(value) == len(before):
        if type(value) is not tuple:
            return value
        return tuple(_same(it, own) for it, own in zip(value, before, strict=True))
    if not isinstance(value, torch.Tensor) or not isinstance(before, torch.Tensor):
        return value
    alike = (value.dtype, value.shape) == (before.dtype, before.shape)
    return before if alike and torch.equal(value, before) else value


def _resized(value: Any, before: torch.Size, after: torch.Size) -> Any:  # noqa: ANN401
    """Return a tensor for as many samples and tokens as there are; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.shape[:2] == before:
        return value.new_zeros((*after, *value.shape[2:]))
    return value


def _probe_output(model: PreTrainedModel, block: Block, ids: torch.Tensor) -> Any:  # noqa: ANN401
    """Learn what a block answers with: a tensor, or a tuple with more in it."""
    outputs: list[Any] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:  # noqa: ANN401
        outputs.append(output)
        raise StopForwardError

    handle = block.module.register_forward_hook(hook)
    try:
        model(input_ids=ids, use_cache=False)
    except StopForwardError:
        handle.remove()
    return outputs[0]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return module
