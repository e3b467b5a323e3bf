"""Perplexity of a loaded model on a text: how well it predicts each next token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = [
    "SAMPLE",
    "SAMPLE_WINDOW",
    "Perplexity",
    "cut_windows",
    "mean_perplexity",
    "measure_perplexity",
    "sample_text",
    "window_loss",
]

SAMPLE = "Sample text"  # what a person calls the one that comes with this package
SAMPLE_WINDOW = 256  # tokens: the sample has about 1,600, and six windows steady a figure


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        windows: how many windows of text were read.
        window_tokens: the tokens of each.
    """

    perplexity: float
    windows: int
    window_tokens: int


def sample_text() -> str:
    """Read the prose that comes with this package, to measure on where there is no other text."""
    return Path(__file__).with_name("sample.txt").read_text(encoding="utf-8")


def measure_perplexity(
    model: LoadedModel,
    text: str,
    *,
    windows: int = 20,
    window_tokens: int = 1024,
    progress: Callable[[Progress], None] | None = None,
) -> Perplexity:
    """Measure perplexity over windows of `text` that follow each other without overlap.

    Every token of a window but its first is predicted from those before it in the window.

    Args:
        model: the model.
        text: tokenised in one go, without a template.
        windows: the most windows to read.
        window_tokens: the tokens of a window, at most the context.
        progress: called with the windows done.

    Raises:
        OptionInvalid: the text has not even one window, or a window exceeds the context.
    """
    cut = cut_windows(model, text, windows=windows, window_tokens=window_tokens)
    losses: list[float] = []
    for window in cut:
        losses.append(window_loss(model, window))
        if progress is not None:
            progress(Progress("perplexity", len(losses), len(cut), "windows"))
    return mean_perplexity(losses, window_tokens=window_tokens)


def cut_windows(
    model: LoadedModel, text: str, *, windows: int, window_tokens: int
) -> list[torch.Tensor]:
    """Cut a text into windows of the model's tokens.

    Raises:
        OptionInvalid: the text has not even one window, or a window exceeds the context.
    """
    import torch

    if not 1 < window_tokens <= model.context:
        raise OptionInvalid(
            f"windows of {window_tokens:,} tokens do not fit the context of {model.context:,}",
            hint="ask for shorter windows: --window-tokens",
        )
    if windows < 1:
        raise OptionInvalid("no window was asked for", hint="ask for one or more: --windows")
    ids = torch.tensor(model.tokenizer(text, verbose=False)["input_ids"])
    if len(ids) < window_tokens:
        raise OptionInvalid(
            f"the text has {len(ids):,} tokens, fewer than a window of {window_tokens:,}",
            hint="give a longer text, or shorter windows: --window-tokens",
        )
    whole = ids[: len(ids) // window_tokens * window_tokens]
    return list(whole.split(window_tokens))[:windows]


def window_loss(model: LoadedModel, window: torch.Tensor) -> float:
    """Add up the negative log-likelihoods of a window's tokens."""
    import torch

    from gptq_loader_plugin.class_errors import class_errors
    from gptq_loader_plugin.generation.rotation import LengthRotation

    ids = window[None].to(model.plan.device.torch_name)
    with (
        torch.inference_mode(),
        class_errors(model.model.config.model_type, model.plan.path),
        LengthRotation(model.model).applied(len(window)),
    ):
        logits = model.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def mean_perplexity(losses: Sequence[float], *, window_tokens: int) -> Perplexity:
    """Turn the losses of windows into a perplexity."""
    mean = sum(losses) / (len(losses) * (window_tokens - 1))
    return Perplexity(math.exp(mean), len(losses), window_tokens)
