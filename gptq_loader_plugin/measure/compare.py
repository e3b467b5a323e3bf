"""Compare checkpoints of one model: perplexity, divergence from a reference, bytes, speed."""

from __future__ import annotations

import gc
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from gptq_loader_plugin.class_errors import class_errors
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
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.measure.results import Measured
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["Compared", "Comparison", "Held", "compare_checkpoints", "compare_loaded"]

T = TypeVar("T")
Logits: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
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


class Held(Protocol):
    """A loaded model that others use too: each call has it for something short.

    A host gives a comparison its model so, a window of text at a time, and answers others between
    two calls.
    """

    def __call__(self, work: Callable[[LoadedModel], T], /) -> T:
        """Run `work` on the model, and return what it returns."""
        ...


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
    with _run(text, text_name, windows, window_tokens, progress) as run:
        if unquantized is not None:
            run.read_unquantized(unquantized)
        for reference in references:
            with load(reference, options=options, plugins=plugins) as model:
                run.read_checkpoint(reference, partial(_use, model), speed=speed)
            gc.collect()
        return run.done()


def compare_loaded(
    models: Sequence[tuple[str, Held]],
    text: str,
    *,
    text_name: str,
    windows: int = 20,
    window_tokens: int = 256,
    speed: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Compare models that are in memory already, as `compare_checkpoints` compares others.

    Args:
        models: each with its name; the first is what the others are compared with.
        text: what is predicted.
        text_name: what a person calls it.
        windows: the most windows to read.
        window_tokens: the tokens of each.
        speed: whether to time a prompt and a reply, too.
        progress: called with the windows done; what it raises ends the comparison.

    Raises:
        OptionInvalid: their tokenizers differ, or the text is shorter than a window.
        GPTQLoaderError: one answers with what is no number.
    """
    with _run(text, text_name, windows, window_tokens, progress) as run:
        for name, use in models:
            run.read_checkpoint(name, use, speed=speed, own_name=name)
        return run.done()


@contextmanager
def _run(
    text: str,
    text_name: str,
    windows: int,
    window_tokens: int,
    progress: Callable[[Progress], None] | None,
) -> Iterator[_Run]:
    """Begin a comparison, with a folder for the reference's probabilities while it lasts."""
    with tempfile.TemporaryDirectory(prefix="gptq-compare-") as folder:
        yield _Run(Path(folder), text, text_name, windows, window_tokens, progress or _silent)


def _use(model: LoadedModel, work: Callable[[LoadedModel], T]) -> T:
    """Have a model to oneself."""
    return work(model)


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
        readers = partial(compute_logits, model), partial(compute_logits, model, is_noisy=True)
        perplexity, divergence = self._read(source.name, self._windows(ids), *readers)
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

    def read_checkpoint(
        self, name: str, use: Held, *, speed: bool, own_name: str | None = None
    ) -> None:
        """Read a quantised model, and time it."""
        windows = use(
            partial(
                cut_windows, text=self.text, windows=self.count, window_tokens=self.window_tokens
            )
        )
        is_reference = self.kept is None

        def logits(window: torch.Tensor, *, is_noisy: bool = False) -> torch.Tensor:
            return use(partial(_logits, window=window, is_noisy=is_noisy))

        noisy = partial(logits, is_noisy=True)
        perplexity, divergence = self._read(name, windows, logits, noisy)
        figure = Perplexity(perplexity, len(windows), self.window_tokens)
        described = partial(
            measurement, perplexity=figure, text=self.text, text_name=self.text_name, name=own_name
        )
        self.measured.append(use(described))
        rates: tuple[float | None, float | None] = (None, None)
        if speed:
            self.progress(Progress("speed", 0, 0, detail=name))
            use(partial(prompt_seconds, tokens=PROMPT))  # prepares what later ones find
            rates = (
                PROMPT / use(partial(prompt_seconds, tokens=PROMPT)),
                REPLY / use(partial(reply_seconds, tokens=REPLY)),
            )
        plan = use(lambda model: model.plan)
        self.models.append(
            Compared(
                name=name,
                is_reference=is_reference,
                size_bytes=plan.checkpoint_bytes,
                perplexity=perplexity,
                divergence=divergence,
                prompt_rate=rates[0],
                reply_rate=rates[1],
                bits=use(lambda model: model.config.bits),
                kernels=tuple(plan.kernels()),
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
        self, name: str, windows: Sequence[torch.Tensor], logits: Logits, noisy: Logits
    ) -> tuple[float, Divergence | None]:
        """Read all windows; of the reference twice, to keep it and for the noise."""
        import torch

        if self.kept is not None:
            if not all(map(torch.equal, windows, self.kept.windows)):
                raise OptionInvalid(
                    f"{name} reads the text as other tokens than {self.models[0].name}",
                    hint="compare checkpoints of one model, with the tokenizer they came with",
                )
            return self._scored(name, self.kept, logits)
        vocabulary = logits(windows[0][:2]).shape[-1]
        kept = KeptReference(self.folder, windows, vocabulary)
        perplexity, _ = self._scored(name, kept, logits, keep=True)
        _, noise = self._scored(f"{name}, its noise floor", kept, noisy)
        self.kept = kept
        return perplexity, noise

    def _scored(
        self,
        name: str,
        kept: KeptReference,
        logits: Logits,
        *,
        keep: bool = False,
    ) -> tuple[float, Divergence | None]:
        perplexity, divergence = 0.0, None
        for done, scored in enumerate(kept.read(logits, keep=keep), start=1):
            self.progress(Progress("compare", done, len(kept.windows), "windows", name))
            if done == len(kept.windows):
                perplexity, divergence = scored.perplexity, scored.divergence
        return perplexity, divergence


def _logits(loaded: LoadedModel, window: torch.Tensor, *, is_noisy: bool) -> torch.Tensor:
    """Compute a window's logits; what fails inside transformers is said in words."""
    with class_errors(loaded.model.config.model_type, loaded.plan.path):
        return compute_logits(loaded.model, window, is_noisy=is_noisy)


def _silent(_: Progress) -> None:
    """Hear nothing."""
