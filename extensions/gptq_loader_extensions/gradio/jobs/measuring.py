"""Measure the perplexity of a page's model between replies, and how far two are apart."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from gptq_loader_extensions.gradio.jobs.models import NoModelLoaded, check_stopped
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.measure.compare import compare_loaded
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
    from collections.abc import Callable, Sequence

    import torch

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.measure.compare import Comparison

__all__ = ["measure", "measure_both", "named_text"]

T = TypeVar("T")
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


def measure_both(
    sides: Sequence[Models],
    own: str | None,
    cancel: threading.Event,
    on_progress: Callable[[Progress], None],
) -> Comparison:
    """Compare the loaded models as `gptq-loader compare` does, one after the other.

    They stay where they are, and replies are written between two windows.

    Args:
        sides: each holds one model; the first is what the others are compared with.
        own: the user's own text, or None for the sample.
        cancel: ends it once it is set.
        on_progress: called with the progress.

    Raises:
        GPTQLoaderError: one is not loaded or was changed, they are of different models, or the
            text is too short.
        Stopped: `cancel` was set.
    """
    text_name, text = named_text(own)
    models = [side.loaded for side in sides]
    if models[0] is None:
        raise NoModelLoaded
    held: list[tuple[str, _Held]] = []
    for side, loaded in zip(sides, models, strict=True):
        if loaded is None:
            raise GPTQLoaderError("there is no second model", hint="choose one above")
        held.append((loaded.name, _Held(side, loaded.model, cancel)))
    length = min(SAMPLE_WINDOW, *(it.model.context for it in models if it))
    for _, use in held:
        use(partial(_cut, text=text, length=length))  # which says what is wrong in a page's words

    def report(progress: Progress) -> None:
        check_stopped(cancel)
        on_progress(progress)

    return compare_loaded(
        held,
        text,
        text_name=text_name,
        windows=WINDOWS,
        window_tokens=length,
        progress=report,
    )


class _Held:
    """A side's model while it is compared: something short at a time, beside its replies."""

    def __init__(self, side: Models, model: LoadedModel, cancel: threading.Event) -> None:
        self._side, self._model, self._cancel = side, model, cancel

    def __call__(self, work: Callable[[LoadedModel], T], /) -> T:
        check_stopped(self._cancel)

        def run(loaded: LoadedModel) -> T:
            _check_same(loaded, self._model)
            return work(loaded)

        return self._side.use(run)


def _cut(model: LoadedModel, text: str, length: int = SAMPLE_WINDOW) -> list[torch.Tensor]:
    length = min(length, model.context)
    try:
        return cut_windows(model, text, windows=WINDOWS, window_tokens=length)
    except OptionInvalid as error:
        raise GPTQLoaderError(error.message, hint="paste a longer text") from error


def _loss(loaded: LoadedModel, *, model: LoadedModel, window: torch.Tensor) -> float:
    _check_same(loaded, model)
    return window_loss(model, window)


def _check_same(loaded: LoadedModel, model: LoadedModel) -> None:
    if loaded is not model:
        raise GPTQLoaderError(
            "another model was loaded while this one was measured", hint="measure again"
        )
