"""Compare checkpoints of one model: perplexity, divergence from a reference, bytes, speed."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.loading import load
from gptq_loader_plugin.measure.divergence import (
    Divergence,
    KeptReference,
    compute_logits,
)
from gptq_loader_plugin.measure.perplexity import Perplexity, cut_windows
from gptq_loader_plugin.measure.results import measurement
from gptq_loader_plugin.measure.speed import prompt_seconds, reply_seconds
from gptq_loader_plugin.quantize.source import load_source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.measure.results import Measured
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["Compared", "Comparison", "compare_checkpoints"]

PROMPT, REPLY = 128, 32  # tokens of what is timed


@dataclass(frozen=True, slots=True)
class Compared:
    """One model among those compared.

    Attributes:
        name: as the user named it.
        is_reference: whether the others are compared with it.
        size_bytes: its weight files together.
        perplexity: on the windows that all read.
        divergence: how far it is from the reference; of the reference, from itself, where its
            hidden states are off by bfloat16's rounding: the noise floor.
        prompt_rate: tokens a second of a prompt, None where speed was not measured.
        reply_rate: tokens a second of a reply.
        bits: the width of most codes, None of a model that is not quantised.
        kernels: what ran it.
    """

    name: str
    is_reference: bool
    size_bytes: int
    perplexity: float
    divergence: Divergence | None
    prompt_rate: float | None = None
    reply_rate: float | None = None
    bits: int | None = None
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several models, compared on one text.

    Attributes:
        models: the reference first.
        windows: how many windows of text were read.
        window_tokens: the tokens of each.
        measured: the perplexities as the page keeps them.
    """

    models: tuple[Compared, ...]
    windows: int
    window_tokens: int
    measured: tuple[Measured, ...]

    @property
    def noise(self) -> Divergence:
        """How far the reference is from itself, rounded: what is below says nothing."""
        divergence = self.models[0].divergence
        if divergence is None:  # it is measured in every comparison
            raise GPTQLoaderError("no noise was measured", hint="compare again")
        return divergence


def compare_checkpoints(
    references: Sequence[str],
    text: str,
    *,
    text_name: str,
    options: LoadOptions,
    plugins: Plugins,
    unquantized: Path | None = None,
    windows: int = 20,
    window_tokens: int = 256,
    speed: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Read a text with each model in turn, one in memory at a time.

    Args:
        references: the checkpoints; the first is what the others are compared with, unless there
            is an unquantised model.
        text: what is predicted.
        text_name: what a person calls it.
        options: how to load each.
        plugins: the plugins in force.
        unquantized: the folder, or .gguf file, of the model they were made of.
        windows: the most windows to read.
        window_tokens: the tokens of each.
        speed: whether to time a prompt and a reply, too.
        progress: called with the windows done.

    Raises:
        OptionInvalid: there is only one model, or their tokenizers differ.
        GPTQLoaderError: one cannot be loaded; see `errors`.
    """
    if len(references) + (unquantized is not None) < 2:
        raise OptionInvalid(
            "there is nothing to compare with", hint="name two checkpoints, or --reference FOLDER"
        )
    with tempfile.TemporaryDirectory(prefix="gptq-compare-") as folder:
        run = _Run(Path(folder), text, text_name, windows, window_tokens, progress or _silent)
        if unquantized is not None:
            run.read_unquantized(unquantized)
        for reference in references:
            with load(reference, options=options, plugins=plugins) as model:
                run.read_checkpoint(reference, model, speed=speed)
            gc.collect()
        return run.done()


class _Run:
    """A comparison under way."""

    def __init__(
        self,
        folder: Path,
        text: str,
        text_name: str,
        windows: int,
        window_tokens: int,
        progress: Callable[[Progress], None],
    ) -> None:
        self.folder, self.text, self.text_name = folder, text, text_name
        self.count, self.window_tokens = windows, window_tokens
        self.progress = progress
        self.models: list[Compared] = []
        self.measured: list[Measured] = []
        self.kept: KeptReference | None = None

    def read_unquantized(self, source: Path) -> None:
        """Read the model that is not quantised."""
        model, tokenizer = load_source(source)
        ids = tokenizer(self.text, verbose=False)["input_ids"]
        perplexity, divergence = self._read(source.name, model, self._windows(ids))
        files = [source] if source.is_file() else source.glob("*.safetensors")
        self.models.append(
            Compared(
                name=source.name,
                is_reference=True,
                size_bytes=sum(file.stat().st_size for file in files),
                perplexity=perplexity,
                divergence=divergence,
            )
        )

    def read_checkpoint(self, name: str, loaded: LoadedModel, *, speed: bool) -> None:
        """Read a quantised model, and time it."""
        windows = cut_windows(
            loaded, self.text, windows=self.count, window_tokens=self.window_tokens
        )
        is_reference = self.kept is None
        perplexity, divergence = self._read(name, loaded.model, windows)
        figure = Perplexity(perplexity, len(windows), self.window_tokens)
        self.measured.append(measurement(loaded, figure, text=self.text, text_name=self.text_name))
        rates: tuple[float | None, float | None] = (None, None)
        if speed:
            prompt_seconds(loaded, PROMPT)  # whose first run prepares what later ones find
            rates = PROMPT / prompt_seconds(loaded, PROMPT), REPLY / reply_seconds(loaded, REPLY)
        self.models.append(
            Compared(
                name=name,
                is_reference=is_reference,
                size_bytes=loaded.plan.checkpoint_bytes,
                perplexity=perplexity,
                divergence=divergence,
                prompt_rate=rates[0],
                reply_rate=rates[1],
                bits=loaded.config.bits,
                kernels=tuple(loaded.plan.kernels()),
            )
        )

    def done(self) -> Comparison:
        """Return what was measured."""
        windows = len(self.kept.windows) if self.kept else 0
        return Comparison(tuple(self.models), windows, self.window_tokens, tuple(self.measured))

    def _windows(self, ids: Sequence[int]) -> list[torch.Tensor]:
        import torch

        tokens = torch.tensor(ids)
        whole = tokens[: len(tokens) // self.window_tokens * self.window_tokens]
        if not len(whole):
            raise OptionInvalid(
                f"the text has {len(tokens):,} tokens, fewer than a window",
                hint="give a longer text, or shorter windows: --window-tokens",
            )
        return list(whole.split(self.window_tokens))[: self.count]

    def _read(
        self,
        name: str,
        model: object,
        windows: Sequence[torch.Tensor],
    ) -> tuple[float, Divergence | None]:
        """Read all windows; of the reference twice, to keep it and for the noise."""
        import torch

        logits = partial(compute_logits, model)
        if self.kept is not None:
            if not all(map(torch.equal, windows, self.kept.windows)):
                raise OptionInvalid(
                    f"{name} reads the text as other tokens than {self.models[0].name}",
                    hint="compare checkpoints of one model, with the tokenizer they came with",
                )
            return self._scored(name, self.kept, logits)
        first = logits(windows[0][:2])
        vocabulary = first.shape[-1]
        kept = KeptReference(self.folder, windows, vocabulary)
        perplexity, _ = self._scored(name, kept, logits, keep=True)
        noisy = partial(compute_logits, model, is_noisy=True)
        _, noise = self._scored(f"{name}, its noise floor", kept, noisy)
        self.kept = kept
        return perplexity, noise

    def _scored(
        self,
        name: str,
        kept: KeptReference,
        logits: Callable[[torch.Tensor], torch.Tensor],
        *,
        keep: bool = False,
    ) -> tuple[float, Divergence | None]:
        perplexity, divergence = 0.0, None
        for done, scored in enumerate(kept.read(logits, keep=keep), start=1):
            self.progress(Progress("compare", done, len(kept.windows), "windows", name))
            if done == len(kept.windows):
                perplexity, divergence = scored.perplexity, scored.divergence
        return perplexity, divergence


def _silent(_: Progress) -> None:
    """Hear nothing."""
