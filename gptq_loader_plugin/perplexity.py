"""Perplexity of a loaded model on a text: how well it predicts each next token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_plugin.loaded import LoadedModel

__all__ = ["Perplexity", "measure_perplexity"]


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
        progress: told the windows done.

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
    count = min(windows, len(ids) // window_tokens)
    if count < 1:
        raise OptionInvalid(
            f"the text has {len(ids):,} tokens, fewer than a window of {window_tokens:,}",
            hint="give a longer text, or shorter windows: --window-tokens",
        )
    total = 0.0
    device = model.plan.device.torch_name
    for i in range(count):
        window = ids[i * window_tokens : (i + 1) * window_tokens][None].to(device)
        with torch.inference_mode():
            logits = model.model(input_ids=window, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        if progress is not None:
            progress(Progress("perplexity", i + 1, count, "windows"))
    mean = total / (count * (window_tokens - 1))
    return Perplexity(math.exp(mean), count, window_tokens)
