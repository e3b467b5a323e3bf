"""Compare a checkpoint with the unquantised model that it was made of: layers, logits, choices.

One model is in memory at a time: the quantised one leaves its logits, and a few of the inputs that
its layers had, on which both weights' outputs are compared.
"""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.generation.kl_divergence import kl_divergence
from gptq_loader_plugin.generation.noise_floor import bfloat16_noise
from gptq_loader_plugin.measure.perplexity import sample_text
from gptq_loader_plugin.model.linears import is_transposed
from gptq_loader_plugin.verify.report import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["LayerError", "Observed", "compare", "observe"]

WINDOWS, WINDOW = 8, 128  # tokens, spread over the sample text
ROWS = 16  # inputs of a layer
# Of two weights that have nothing to do with each other the error is 1.41; of 2 bits in groups of
# 128 by plain rounding 0.6.
UNRELATED = 1.0
SHOWN = 5  # of the worst layers


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a layer is from the unquantised one.

    Attributes:
        name: the layer's name in the checkpoint.
        weight: the relative Frobenius error of its weight.
        output: the worst relative error of an output, over sampled inputs; those of the text where
            the layer could be watched, else random ones.
    """

    name: str
    weight: float
    output: float


@dataclass(frozen=True, slots=True)
class Observed:
    """What the quantised model leaves for the comparison.

    Attributes:
        windows: tokens [count, length].
        logits: float32 [count, length, vocabulary].
        inputs: a few inputs of each layer that could be watched, [rows, K].
    """

    windows: torch.Tensor
    logits: torch.Tensor
    inputs: dict[str, torch.Tensor]


def observe(model: LoadedModel, layers: list[str]) -> Observed:
    """Run the text through the quantised model; keep its logits, and inputs of its layers.

    Raises:
        OptionInvalid: the sample text is shorter than a window of the model's tokens.
    """
    import torch

    ids = torch.tensor(model.tokenizer(sample_text(), verbose=False)["input_ids"])
    length = min(WINDOW, model.context)
    if len(ids) < length:
        raise OptionInvalid(
            f"the sample text has {len(ids)} tokens, and a window {length}",
            hint="leave --reference out",
        )
    count = min(WINDOWS, len(ids) // length)
    windows = ids[: count * length].reshape(count, length)
    inputs: dict[str, torch.Tensor] = {}
    with _watched(model.model, layers, inputs):
        logits = _logits(model.model, windows)
    return Observed(windows, logits, inputs)


def compare(
    checkpoint: Checkpoint,
    observed: Observed,
    reference: Path,
    progress: Callable[[Progress], None],
) -> tuple[list[Finding], dict[str, Any]]:
    """Compare layers and logits with those of the unquantised model.

    Args:
        checkpoint: the quantised checkpoint, open.
        observed: what the quantised model left.
        reference: the unquantised model's folder, or its GGUF file.
        progress: called with the layers done.

    Returns:
        What is wrong, and what was measured.

    Raises:
        BadReference: there is no such model.
        QuantizeError: transformers cannot load it.
        OptionInvalid: it is another model, of other sizes.
    """
    from gptq_loader_plugin.quantize.source import load_source

    model, _ = load_source(reference)
    errors, findings, skipped = [], [], []
    for count, name in enumerate(checkpoint.layers, start=1):
        progress(Progress("reference", count, len(checkpoint.layers), "layers", name))
        weight = _weight(model, name)
        if weight is None:
            skipped.append(name)
            continue
        error = _error(checkpoint, name, weight, observed.inputs.get(name))
        errors.append(error)
        if error.weight > UNRELATED:
            findings.append(_unrelated(error, checkpoint, model))
    facts: dict[str, Any] = {
        "layers": [asdict(error) for error in errors],
        "not_compared": skipped,
        **_divergence(model, observed),
    }
    if errors:
        facts["median_weight_error"] = sorted(it.weight for it in errors)[len(errors) // 2]
        facts["worst"] = [
            it.name for it in sorted(errors, key=lambda it: it.weight, reverse=True)[:SHOWN]
        ]
    return findings, facts


def _error(
    checkpoint: Checkpoint, name: str, weight: torch.Tensor, inputs: torch.Tensor | None
) -> LayerError:
    import torch

    packed = checkpoint.packed(name).dequantize()  # [N, K]
    if packed.shape != weight.shape:
        raise OptionInvalid(
            f"{name} is {list(packed.shape)}, and {list(weight.shape)} in the reference",
            hint="name the unquantised model that this checkpoint was made of: --reference",
        )
    difference = packed - weight
    if inputs is None:
        seeded = torch.Generator().manual_seed(0)
        inputs = torch.randn(ROWS, weight.shape[1], generator=seeded)
    right = (inputs @ weight.t()).norm(dim=1).clamp_min(1e-12)
    output = (inputs @ difference.t()).norm(dim=1) / right
    relative = float(difference.norm() / weight.norm().clamp_min(1e-12))
    return LayerError(name, round(relative, 5), round(float(output.max()), 5))


def _unrelated(error: LayerError, checkpoint: Checkpoint, model: PreTrainedModel) -> Finding:
    """Name a layer that is not the reference's, and whose it is."""
    own = checkpoint.packed(error.name).dequantize()
    kind = re.sub(r"\d+", "#", error.name)
    for name in checkpoint.layers:
        if re.sub(r"\d+", "#", name) != kind or name == error.name:
            continue
        other = _weight(model, name)
        if other is not None and other.shape == own.shape:
            distance = float((own - other).norm() / other.norm().clamp_min(1e-12))
            if distance < UNRELATED / 2:
                words = f"{error.name} is the reference's {name}: layers were swapped"
                break
    else:
        words = (
            f"{error.name} has nothing to do with the reference's: its error is {error.weight:.2f}"
        )
    return Finding(
        "reference",
        wrong=True,
        message=words,
        where=error.name,
        fix="download the checkpoint again, or name the model that it was made of",
    )


def _divergence(model: PreTrainedModel, observed: Observed) -> dict[str, Any]:
    """Compare the predictions: the Kullback-Leibler divergence in nats, and the first choices."""
    import torch

    right = _logits(model, observed.windows)
    shared = min(right.shape[-1], observed.logits.shape[-1])  # either may be padded
    reference = torch.log_softmax(right[..., :shared], dim=-1)
    with bfloat16_noise(model):
        noisy = _logits(model, observed.windows)
    floor = kl_divergence(reference, torch.log_softmax(noisy[..., :shared], dim=-1))
    kl = kl_divergence(
        reference, torch.log_softmax(observed.logits[..., :shared], dim=-1)
    ).flatten()
    own = torch.log_softmax(observed.logits, -1)
    same = reference.argmax(-1) == observed.logits[..., :shared].argmax(-1)
    return {
        "tokens": kl.numel(),
        "kl_mean": round(float(kl.mean()), 6),
        "kl_median": round(float(kl.median()), 6),
        "kl_p90": round(float(kl.quantile(0.9)), 6),
        "kl_max": round(float(kl.max()), 6),
        "kl_noise_floor": round(float(floor.mean()), 6),
        "top1_agreement": round(float(same.float().mean()), 4),
        "perplexity_reference": round(_perplexity(reference, observed.windows), 3),
        "perplexity": round(_perplexity(own, observed.windows), 3),
    }


def _perplexity(log_probabilities: torch.Tensor, windows: torch.Tensor) -> float:
    picked = log_probabilities[:, :-1].gather(-1, windows[:, 1:, None])
    return math.exp(-float(picked.mean()))


def _logits(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Return float32 logits, a window at a time."""
    import torch

    with torch.inference_mode():
        rows = [
            model(input_ids=window[None].to(model.device), use_cache=False).logits[0].float().cpu()
            for window in windows
        ]
    return torch.stack(rows)


@contextmanager
def _watched(
    model: PreTrainedModel, layers: list[str], inputs: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Keep the first inputs of each layer."""

    def keep(name: str) -> Any:  # noqa: ANN401 - torch's hook type
        def hook(_module: object, arguments: tuple[Any, ...]) -> None:
            if name not in inputs and arguments:
                inputs[name] = arguments[0].detach().flatten(0, -2)[:ROWS].float().cpu()

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name in layers
        if (module := _module(model, name)) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module(model: PreTrainedModel, name: str) -> Any:  # noqa: ANN401 - a module
    """Find a layer's module by its name in the checkpoint, with the model's prefix or without."""
    prefix = f"{model.base_model_prefix}."
    for path in (name, f"{prefix}{name}", name.removeprefix(prefix)):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return None


def _weight(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    """Return a layer's unquantised weight, float32 [N, K]; None where it is part of another's."""
    module = _module(model, name)
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return None
    matrix: torch.Tensor = weight.detach().float()
    return matrix.t() if is_transposed(module) else matrix
