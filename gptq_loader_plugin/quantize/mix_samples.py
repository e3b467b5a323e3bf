"""Draw the samples of a mix, render them by the model's template, and count what came of them.

Splits, draws and counts are those of Open-Assistant's pretokenizer: rows are shuffled by a fixed
seed and the first of them held out; of the others' samples, a share is drawn without replacement by
one generator for all data sets; and the statistics are written in its words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.errors import OptionInvalid, QuantizeError
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.quantize.mix_rows import read_rows, samples_of
from gptq_loader_plugin.quantize.own_chats import render_chat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.quantize.mix import CalibrationMix, DataSet
    from gptq_loader_plugin.quantize.mix_rows import Sample

__all__ = ["Mixed", "TokenStats", "mix_samples"]

SPLIT_SEED = 666
RULE = "-" * 17
REPORT = 100  # samples between two reports of progress


@dataclass(slots=True)
class TokenStats:
    """What came of a data set.

    Attributes:
        name: the data set's.
        total: its samples after the draw.
        fraction: the share that was drawn.
        skipped: samples with too little of the assistant in them.
        lengths: the tokens of each sample that was taken.
    """

    name: str
    total: int
    fraction: float
    skipped: int
    lengths: list[int]

    def text(self) -> str:
        """Write them as the pretokenizer does."""
        accepted, tokens = len(self.lengths), sum(self.lengths)
        processed = accepted + self.skipped
        share = accepted / processed if processed else 0.0
        return "\n".join(
            [
                f"## Stats for '{self.name}' ({self.total} samples ({self.fraction:.1%}))",
                RULE,
                f"  Accepted: {accepted}/{processed} ({share:.1%})",
                f"  Accepted tokens: {tokens}",
                f"  Skipped: {self.skipped} ({1 - share if processed else 0:.1%})",
                f"  Min tokens per sample: {min(self.lengths, default=None)}",
                f"  Max tokens per sample: {max(self.lengths, default=0)}",
                f"  Avg tokens per sample: {tokens / accepted if accepted else 0.0}",
                f"{RULE}\n",
            ]
        )


@dataclass(frozen=True, slots=True)
class Mixed:
    """A mix as text.

    Attributes:
        text: the samples to calibrate on, shuffled.
        held_out: those to measure on; empty where nothing is held out.
        statistics: what came of each data set, for people.
    """

    text: str
    held_out: str
    statistics: str


def mix_samples(
    mix: CalibrationMix,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Callable[[Progress], None],
) -> Mixed:
    """Read, draw and render a mix.

    Args:
        mix: the data sets and their shares.
        tokenizer: the model's, with a chat template where there are chats.
        progress: called with the samples rendered.

    Raises:
        OptionInvalid: a file cannot be read, or has fewer samples than are to be drawn.
        QuantizeError: a chat does not fit the template, or no sample is left.
    """
    draws = np.random.RandomState(mix.rng_seed)
    splits = [_split(data_set) for data_set in mix.datasets]
    train = [
        _drawn(data_set, samples, draws)
        for data_set, (samples, _) in zip(mix.datasets, splits, strict=True)
    ]
    held = [(it.name, 1.0, samples) for it, (_, samples) in zip(mix.datasets, splits, strict=True)]
    renderer = _Renderer(mix, tokenizer, progress)
    text, statistics = renderer.render("train", train)
    if not text:
        raise QuantizeError(
            "the calibration mix has no sample left", hint="lower its min_assistant_tokens"
        )
    held_out, of_held = renderer.render("val", [it for it in held if it[2]])
    if mix.holds_out and not held_out:
        raise QuantizeError(
            "the calibration mix holds out no sample to measure on",
            hint="give it more rows, or val_split: 0 in each data set",
        )
    draws.shuffle(text)
    return Mixed("".join(text), "".join(held_out), statistics + of_held)


def _split(data_set: DataSet) -> tuple[list[Sample], list[Sample]]:
    """Split a data set's rows, and return the samples of both parts."""
    rows = read_rows(data_set)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(rows)).tolist()
    count = min(math.ceil(len(rows) * data_set.val_split), max(len(rows) - 1, 0))
    held = set(order[:count])
    train = [it for i, row in enumerate(rows) if i not in held for it in samples_of(row, data_set)]
    val = [it for i in sorted(held) for it in samples_of(rows[i], data_set)]
    if not train:
        of_lang = f" in {data_set.lang}" if data_set.lang else ""
        raise OptionInvalid(
            f"{data_set.name}: {data_set.input_file_path.name} has no sample{of_lang}",
            hint="correct its lang, top_k or input_file_path",
        )
    most = data_set.max_val_set
    if most is not None and most < len(val):
        chosen = np.random.RandomState(SPLIT_SEED).choice(len(val), most, replace=False)
        val = [val[i] for i in chosen.tolist()]
    return train, val


def _drawn(
    data_set: DataSet, samples: list[Sample], draws: np.random.RandomState
) -> tuple[str, float, list[Sample]]:
    """Draw the share of a data set: its name in the statistics, the share, and the samples."""
    if data_set.size is not None and data_set.size > len(samples):
        raise OptionInvalid(
            f"{data_set.name}: size is {data_set.size}, and it has {len(samples)} samples",
            hint="give a smaller size, or a fraction",
        )
    fraction = data_set.size / len(samples) if data_set.size else data_set.fraction
    count = data_set.size or int(len(samples) * fraction)
    if count == len(samples):
        return data_set.name, fraction, samples
    chosen = draws.choice(len(samples), size=count, replace=False).tolist()
    return f"Subset of {data_set.name}", fraction, [samples[i] for i in chosen]


class _Renderer:
    """Render samples, skip those with too little of the assistant, and count.

    Args:
        mix: what is to be skipped.
        tokenizer: the model's.
        progress: called with the samples rendered.
    """

    def __init__(
        self,
        mix: CalibrationMix,
        tokenizer: PreTrainedTokenizerBase,
        progress: Callable[[Progress], None],
    ) -> None:
        self._least = mix.min_assistant_tokens
        self._tokenizer, self._progress = tokenizer, progress

    def render(
        self, split: str, sets: Sequence[tuple[str, float, list[Sample]]]
    ) -> tuple[list[str], str]:
        """Return the samples that are taken, and the statistics of all data sets."""
        texts: list[str] = []
        every: list[TokenStats] = []
        total = sum(len(samples) for *_, samples in sets)
        for name, fraction, samples in sets:
            stats = TokenStats(name, len(samples), fraction, 0, [])
            every.append(stats)
            for sample in samples:
                text = sample if isinstance(sample, str) else self._chat(name, sample)
                if self._too_little(sample):
                    stats.skipped += 1
                else:
                    stats.lengths.append(self._tokens(text))
                    texts.append(f"{text}\n\n" if isinstance(sample, str) else text)
                done = sum(len(it.lengths) + it.skipped for it in every)
                if done % REPORT == 0 or done == total:
                    self._progress(Progress("mix", done, total, "samples", f"{name}, {split}"))
        lengths = [length for it in every for length in it.lengths]
        every.append(TokenStats("total", total, 1, sum(it.skipped for it in every), lengths))
        title = f"# Stats for calibration-{split}\n\n"
        return texts, title + "\n".join(it.text() for it in every) + "\n" if sets else ""

    def _chat(self, name: str, chat: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return render_chat(self._tokenizer, chat)
        except (TemplateError, ValueError, TypeError) as error:
            raise QuantizeError(
                f"{name}: a chat does not fit the model's template ({str(error)[:150]})",
                hint="take chats of the roles it knows, or a model that has a template",
            ) from error

    def _too_little(self, sample: Sample) -> bool:
        """Whether a chat's assistant says too little, its markup included."""
        if self._least is None or isinstance(sample, str):
            return False
        tokens = 0
        for i, message in enumerate(sample):
            if message["role"] == "assistant":
                before = self._tokens(render_chat(self._tokenizer, sample[:i])) if i else 0
                tokens += self._tokens(render_chat(self._tokenizer, sample[: i + 1])) - before
        return tokens < self._least

    def _tokens(self, text: str) -> int:
        ids: Any = self._tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        return len(ids)
