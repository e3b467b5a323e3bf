"""Tune the scales of all layers together, towards the unquantised model's own probabilities.

GPTQ makes each layer's outputs right, and a block's at most; what all those errors come to in the
model's answers nobody has looked at so far. Here the scales s of every group of every layer, codes
and zeros fixed, take steps against the gradient of

    mean over the calibration's tokens of  KL( p(unquantised) || p(quantised; s) )

as EfficientQAT does in its second phase (Chen et al. 2024, arXiv:2407.11062), but towards the
unquantised model's probabilities and not towards the text, so that the text's own subject is not
learnt. Adam takes the steps, on each scale's relative change. The file stays what it was: standard
GPTQ, of the same size.

The unquantised model's probabilities would take a vocabulary of numbers for each token. What goes
into its output embedding is enough, since that is the same in both models: it is recorded before
the first layer is quantised, and rides along in the quantised model's passes.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.class_errors import raised_in_transformers
from gptq_loader_plugin.errors import is_out_of_memory
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.generation.kl_divergence import kl_divergence
from gptq_loader_plugin.model.linears import is_transposed
from gptq_loader_plugin.quantize.blocks import linears
from gptq_loader_plugin.quantize.time_left import say_left

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from gptq_loader_plugin.quantize.algorithm import QuantizedWeight
    from gptq_loader_plugin.quantize.blocks import Block
    from gptq_loader_plugin.quantize.kept_blocks import KeptBlocks

__all__ = ["ScaleTuner", "recorded_bytes", "tuning_bytes"]

WINDOW = 512  # tokens of a step
STEPS = 64  # at most; each is of a window of its own
RATE = 2e-3  # of a scale's relative change, after a few steps; it falls linearly to zero
WARM_UP = 5  # steps in which it rises to that
BETAS = (0.9, 0.99)
KEPT_EVERY = 8  # steps
# Bytes that are alive at once in a step: for each weight, its rounded copy and its code; for each
# token, its logits and what is made of them; for each token and layer, what the way back needs.
WEIGHT_BYTES, LOGITS, ACTIVATIONS = 3, 8, 3


def tuning_bytes(model: PreTrainedModel) -> int:
    """Count what a step takes beside the model's weights."""
    head: Any = model.get_output_embeddings()
    if head is None:
        return 0
    weights = sum(it.numel() for it in model.parameters())
    linears = sum(it.shape[0] for it in model.parameters() if it.dim() == 2)
    tokens = LOGITS * head.weight.shape[0] + ACTIVATIONS * linears
    bytes_: int = WEIGHT_BYTES * weights + 4 * WINDOW * tokens
    return bytes_


def recorded_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Count what is recorded of a calibration of so many tokens, and held until the tuning."""
    head: Any = model.get_output_embeddings()
    return 0 if head is None else 4 * min(tokens, STEPS * WINDOW) * int(head.weight.shape[1])


class _NotBackwardsError(Exception):
    """Raised where a model's class has no way back: it changes in place what that needs."""


class HeadInputs:
    """What an unquantised model hands to its output embedding, for windows of the calibration.

    Args:
        model: the model, not quantised yet.
        batches: the calibration, int64 [samples, tokens] each.
        progress: called with the windows read.

    Attributes:
        windows: the token ids of each, int64 [tokens].
        states: what the output embedding is called with, float32 [1, tokens, hidden].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[torch.Tensor],
        progress: Callable[[Progress], None],
    ) -> None:
        every = [part for batch in batches for row in batch for part in row.split(WINDOW)]
        every = [part for part in every if len(part) == len(every[0])]
        places = torch.linspace(0, max(len(every) - 1, 0), min(STEPS, len(every))).long()
        self.windows = [every[i] for i in places.tolist()]
        self.states: list[torch.Tensor] = []
        for done, window in enumerate(self.windows, 1):
            self.states += _head_inputs(model, window)
            progress(Progress("read answers", done, len(self.windows), "windows", ""))

    @property
    def found(self) -> bool:
        """Whether there are any: the model has to call its output embedding once in a pass."""
        return 0 < len(self.states) == len(self.windows)


@torch.inference_mode()
def _head_inputs(model: PreTrainedModel, window: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def hook(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        found.append(arguments[0].clone())

    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(hook)
    try:
        model(input_ids=window[None], use_cache=False)
    finally:
        handle.remove()
    return found


@dataclass(slots=True)
class _Layer:
    """A quantised linear whose scales move.

    Attributes:
        module: the linear.
        codes: uint8 [K, N].
        zeros: uint8 [G, N].
        groups: the group of each row, int64 [K].
        scales: those it began with, float32 [G, N].
        factors: what they are multiplied by, less one, [G, N].
    """

    module: Any
    codes: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.factors = torch.zeros_like(self.scales, requires_grad=True)

    @classmethod
    def of(cls, module: nn.Module, weight: QuantizedWeight) -> _Layer:
        """Begin with a weight's scales; copies, since those of inference mode cannot learn."""
        return cls(
            module,
            weight.codes.clone(),
            weight.zeros.clone(),
            weight.g_idx.long(),
            weight.scales.float().clone(),
        )

    def rounded(self) -> torch.Tensor:
        """Return the scales as the file holds them: float16 [G, N]."""
        scales = (self.scales * (1 + self.factors.detach())).half()
        return torch.where(scales.isfinite() & (scales != 0), scales, self.scales.half())

    def apply(self) -> None:
        """Have the linear compute with them."""
        weight = self._steps().mul_(self.rounded().float()[self.groups])
        self.module.weight.data = weight if is_transposed(self.module) else weight.t().contiguous()

    def reset(self) -> None:
        """Go back to the scales that it began with."""
        self.factors.data.zero_()
        self.apply()

    def take_gradient(self, weight: torch.Tensor) -> None:
        """Make the weight's gradient the scales'; it is given up."""
        assert weight.grad is not None
        slope = weight.grad if is_transposed(self.module) else weight.grad.t()
        weight.grad = None
        of_groups = torch.zeros_like(self.scales)
        of_groups.index_add_(0, self.groups, self._steps().mul_(slope))
        self.factors.grad = of_groups.mul_(self.scales)

    def _steps(self) -> torch.Tensor:
        return self.codes.float().sub_(self.zeros.float()[self.groups])


class ScaleTuner:
    """The tuning of scales in a run: what is recorded before it, and what comes of it.

    Args:
        model: the model, not quantised yet.
        blocks: its blocks.
        batches: the calibration, int64 [samples, tokens] each; none where nothing is to be tuned.
        kept: where finished blocks are, and the state of the tuning every few steps, so that an
            interrupted run goes on.
        progress: called with what is read, then with the steps and the divergence.
        tell: called with a line where the scales cannot be tuned.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        batches: Sequence[torch.Tensor],
        kept: KeptBlocks,
        progress: Callable[[Progress], None],
        tell: Callable[[str], None],
    ) -> None:
        self._model, self._blocks, self._kept = model, blocks, kept
        self._progress, self._tell = progress, tell
        self._expected = HeadInputs(model, batches, progress)
        self._scales: dict[str, torch.Tensor] = {}

    def tune(self) -> None:
        """Tune the scales of all finished layers; the model computes with them afterwards.

        They stay where the model has no answers to record, or cannot be run backwards.
        """
        if not self._expected.windows:
            return
        if not self._expected.found:
            self._refuse("does not call its output embedding once in a pass")
            return
        with torch.inference_mode(mode=False), torch.enable_grad():
            layers = {}
            for i, block in enumerate(self._blocks):
                modules = linears(block)
                for path, weight in (self._kept.read(i) or {}).items():
                    layers[path] = _Layer.of(modules[path], weight)
                    layers[path].apply()
            try:
                self._take_steps(layers, self._expected)
            except _NotBackwardsError as error:
                self._refuse(f"cannot be run backwards ({error})")
                for layer in layers.values():
                    layer.reset()
                return
        self._scales = {path: it.rounded() for path, it in layers.items()}

    def read_layer(self, block: int, path: str) -> QuantizedWeight:
        """Read a finished layer of a block, with the scales that it has now."""
        weight = self._kept.read_layer(block, path)
        return replace(weight, scales=self._scales.get(path, weight.scales))

    def _refuse(self, why: str) -> None:
        name = type(self._model).__name__
        self._tell(f"The scales of all layers are not tuned together: a {name} {why}.")

    def _take_steps(self, layers: Mapping[str, _Layer], expected: HeadInputs) -> None:
        optimizer = torch.optim.Adam([it.factors for it in layers.values()], RATE, BETAS)
        begun = _resume(self._kept, layers, optimizer)
        steps, began = len(expected.windows), time.monotonic()
        order = torch.randperm(steps, generator=torch.Generator().manual_seed(0)).tolist()
        with _learning(self._model, layers):
            for step in range(begun, steps):
                for group in optimizer.param_groups:
                    group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 - step / steps)
                loss = _backward(self._model, expected, order[step])
                optimizer.step()
                optimizer.zero_grad()
                for layer in layers.values():
                    layer.apply()
                each = (time.monotonic() - began) / (step + 1 - begun)
                detail = f"divergence {loss:.3f} nats, {say_left(each * (steps - step - 1))}"
                self._progress(Progress("tune scales", step + 1, steps, "steps", detail))
                if (step + 1) % KEPT_EVERY == 0:
                    _keep(self._kept, step + 1, layers, optimizer)


def _backward(model: PreTrainedModel, expected: HeadInputs, number: int) -> float:
    """Run a window's divergence backwards, and return it: nats a token."""
    try:
        # Copies: tensors of inference mode have no way back.
        loss = _divergence(model, expected.windows[number].clone(), expected.states[number].clone())
        loss.backward()
    except Exception as error:
        of_class = isinstance(error, RuntimeError) or raised_in_transformers(error)
        if is_out_of_memory(error) or not of_class:
            raise
        raise _NotBackwardsError(" ".join(str(error).split())[:200]) from error
    return float(loss.detach())


def _divergence(model: PreTrainedModel, ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Compute the divergence from what the unquantised model's states become; a scalar.

    Those go through the output embedding, and whatever comes after it, beside the model's own.
    """

    def beside(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.cat([states.to(arguments[0].dtype), arguments[0]]), *arguments[1:])

    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(beside)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[None], use_cache=False).logits
    finally:
        handle.remove()
    if len(logits) != 2:
        raise _NotBackwardsError(f"its logits are {tuple(logits.shape)}")
    right, own = logits.float().log_softmax(-1)
    return kl_divergence(right.detach(), own).mean()


@contextmanager
def _learning(model: PreTrainedModel, layers: Mapping[str, _Layer]) -> Iterator[None]:
    """Have backward passes inside reach the layers' scales, and nothing else."""
    asked = {id(it): (it, it.requires_grad) for it in model.parameters()}
    for parameter, _ in asked.values():
        parameter.requires_grad_(False)  # noqa: FBT003
    handles = []
    for layer in layers.values():
        layer.module.weight.requires_grad_(True)  # noqa: FBT003
        handles.append(layer.module.weight.register_post_accumulate_grad_hook(layer.take_gradient))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.module.weight.requires_grad_(False)  # noqa: FBT003
        for parameter, before in asked.values():
            parameter.requires_grad_(before)


def _keep(
    kept: KeptBlocks, steps: int, layers: Mapping[str, _Layer], optimizer: torch.optim.Adam
) -> None:
    tensors = {}
    for path, layer in layers.items():
        state = optimizer.state[layer.factors]
        tensors[f"{path}/factors"] = layer.factors.detach()
        tensors[f"{path}/mean"] = state["exp_avg"]
        tensors[f"{path}/square"] = state["exp_avg_sq"]
    kept.write_tuning(steps, tensors)


def _resume(kept: KeptBlocks, layers: Mapping[str, _Layer], optimizer: torch.optim.Adam) -> int:
    """Go on where an interrupted run was: return the steps that are done."""
    steps, tensors = kept.read_tuning()
    if not steps:
        return 0
    for path, layer in layers.items():
        layer.factors.data.copy_(tensors[f"{path}/factors"])
        optimizer.state[layer.factors] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": tensors[f"{path}/mean"],
            "exp_avg_sq": tensors[f"{path}/square"],
        }
        layer.apply()
    return steps
