"""Measure the perplexity of a page's model between replies."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio.jobs.models import check_stopped
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.measure.perplexity import (
    SAMPLE,
    SAMPLE_WINDOW,
    Perplexity,
    cut_windows,
    mean_perplexity,
    sample_text,
    window_loss,
)
from gptq_loader_plugin.measure.results import Measured, measurement

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    import torch

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["measure", "named_text"]

WINDOWS = 20  # of SAMPLE_WINDOW tokens: a pasted book takes no longer than some pages
TITLE_LENGTH = 40


def named_text(own: str | None) -> tuple[str, str]:
    """Return a text's title, and the text: the user's own, or the sample where it is None."""
    if own is None:
        return SAMPLE, sample_text()
    title = " ".join(own.split())
    if len(title) > TITLE_LENGTH:
        title = f"{title[: TITLE_LENGTH - 1].rstrip()}…"
    return f"“{title}”", own


def measure(
    models: Models,
    own: str | None,
    cancel: threading.Event,
    on_progress: Callable[[Progress], None],
) -> Measured:
    """Measure the loaded model, a window at a time: replies are written between two windows.

    Args:
        models: holds the model.
        own: the user's own text, or None for the sample.
        cancel: ends it once it is set.
        on_progress: called with the progress.

    Raises:
        GPTQLoaderError: no model is loaded, it was changed, or the text is too short.
        Stopped: `cancel` was set.
    """
    text_name, text = named_text(own)
    model, windows = models.use(lambda model: (model, _cut(model, text)))
    loaded = models.loaded
    name = loaded.name if loaded and loaded.model is model else None
    losses: list[float] = []
    result = Perplexity(math.nan, 0, 0)
    for window in windows:
        check_stopped(cancel)
        losses.append(models.use(partial(_loss, model=model, window=window)))
        result = mean_perplexity(losses, window_tokens=len(window))
        detail = f"{name}: {result.perplexity:.2f} so far"
        on_progress(Progress("perplexity", len(losses), len(windows), "windows", detail))
    return measurement(model, result, text=text, text_name=text_name, name=name)


def _cut(model: LoadedModel, text: str) -> list[torch.Tensor]:
    length = min(SAMPLE_WINDOW, model.context)
    try:
        return cut_windows(model, text, windows=WINDOWS, window_tokens=length)
    except OptionInvalid as error:
        raise GPTQLoaderError(error.message, hint="paste a longer text") from error


def _loss(loaded: LoadedModel, *, model: LoadedModel, window: torch.Tensor) -> float:
    if loaded is not model:
        raise GPTQLoaderError(
            "another model was loaded while this one was measured", hint="press Measure again"
        )
    return window_loss(model, window)
