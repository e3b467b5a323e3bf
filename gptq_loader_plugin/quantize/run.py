"""Quantise a model block by block, keeping each finished block, so that a run can go on."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from gptq_loader_plugin.checkpoint.weight_files import KEPT, KEPT_LOCK
from gptq_loader_plugin.class_errors import raised_in_transformers
from gptq_loader_plugin.errors import (
    GPTQLoaderError,
    QuantizeError,
    is_out_of_memory,
)
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.planning.model_shape import ModelShape
from gptq_loader_plugin.quantize.blocks import (
    find_blocks,
    left_out,
    linears,
    separate_experts,
)
from gptq_loader_plugin.quantize.budget import Budget, loosest
from gptq_loader_plugin.quantize.calibration import calibration_samples, calibration_text
from gptq_loader_plugin.quantize.kept_blocks import KeptBlocks, only_writer
from gptq_loader_plugin.quantize.memory import Samples, forecast_run
from gptq_loader_plugin.quantize.mix import CalibrationMix
from gptq_loader_plugin.quantize.mix_samples import mix_samples
from gptq_loader_plugin.quantize.mixed_widths import MixedWidths
from gptq_loader_plugin.quantize.packed_layer import PackedLayer
from gptq_loader_plugin.quantize.quality import HeldOutText, write_quality
from gptq_loader_plugin.quantize.quantize_blocks import SHORT, at_once, by_blocks
from gptq_loader_plugin.quantize.source import check_addresses, check_there, open_source
from gptq_loader_plugin.quantize.tune_scales import ScaleTuner
from gptq_loader_plugin.quantize.whole_decoder import (
    decoder_blocks,
    runs_by_blocks,
)
from gptq_loader_plugin.quantize.widths import Widths
from gptq_loader_plugin.quantize.work import Work
from gptq_loader_plugin.quantize.writer import hub_names, write_checkpoint
from gptq_loader_plugin.system.atomic_file import write_whole
from gptq_loader_plugin.system.file_lock import lock_holder
from gptq_loader_plugin.system.paths import local_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptq_loader_plugin.quantize.options import QuantizeOptions
    from gptq_loader_plugin.quantize.streamed import StreamedWeights

__all__ = ["quantize", "quantize_model"]

BATCH_TOKENS = 4096  # hidden states are run through a block this many tokens at a time
TUNED_TOKENS = 1024  # where each batch is a step of tuning
UNKNOWN_CONTEXT = 2048
SUMMED = 1 << 22  # numbers that are added up at a time: torch makes int64 of them first
STATISTICS_FILE = "calibration_stats.txt"


def quantize_model(
    source: Path | str,
    out: Path | str,
    *,
    options: QuantizeOptions,
    text: Path | Literal["own"] | CalibrationMix | None = None,
    chat_template: str | None = None,
    held_out: str | None = None,
    max_memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Quantise the model in a folder or a .gguf file, and write a checkpoint.

    Args:
        source: a folder transformers can load, or a .gguf file.
        out: the folder to write; an interrupted run into it goes on.
        options: how to quantise.
        text: the calibration text, or a .jsonl of chats; "own" lets the model write the chats
            itself; a mix of data sets; None takes prose that comes with Python.
        chat_template: a Jinja template to use and to write in place of the model's own.
        held_out: a text to compare the quantised model with the other on; what is measured is
            written beside the checkpoint (`quality.json`, README.md). None takes what a mix holds
            out, and measures nothing where there is none.
        max_memory: the most bytes of memory to take; None takes what is free.
        progress: called with the layers done.
        tell: called with lines for people, before the work they are about: a mix's statistics,
            the size to expect.

    Returns:
        The folder.

    Raises:
        QuantizeError: the source cannot be loaded, or it cannot be quantised as asked, or `out`
            holds something else, or another process is writing there.
        OptionInvalid: the size is none, or the file to calibrate on holds no text.
        NotEnoughMemory: a block alone needs more than there is, or a limit leaves fewer addresses
            than any model takes.
    """
    progress = progress or _ignore
    if options.size:
        Budget.parse(options.size)
    with only_writer(local_path(out)) as folder:
        _check_free(folder)
        check_addresses(local_path(source), text if isinstance(text, Path) else None)
        check_there(local_path(source))
        progress(Progress("read model", 0, 1, "files", str(source)))
        # A model that writes its own chats, or whose widths are chosen by a pass backwards.
        whole = text == "own" or options.size is not None
        model, tokenizer, weights = open_source(local_path(source), whole=whole)
        progress(Progress("read model", 1, 1, "files", str(source)))
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        context = ModelShape.of_config(model.config).context or UNKNOWN_CONTEXT
        with _class_errors(model):
            statistics = ""
            if isinstance(text, CalibrationMix):
                mixed = mix_samples(text, tokenizer, progress=progress)
                content, statistics = mixed.text, mixed.statistics
                held_out = held_out or mixed.held_out or None
                (tell or _ignore)(statistics)
            else:
                content = calibration_text(model, tokenizer, options, text=text, progress=progress)
            samples = calibration_samples(tokenizer, options, content, context=context)
            measured = None
            if held_out is not None:
                streams = weights is not None
                measured = HeldOutText(model, tokenizer, held_out, progress, at_once=streams)

            def finish(widths: Widths, losses: Mapping[str, float]) -> None:
                if statistics:
                    write_whole(folder / STATISTICS_FILE, statistics)
                if measured is not None:
                    name, compared = local_path(source).name, measured.compare(model)
                    write_quality(folder, widths, losses, compared, measured.floor, name=name)

            return _quantize(
                model,
                tokenizer,
                folder,
                options=options,
                samples=samples,
                progress=progress,
                finish=finish,
                weights=weights,
                max_memory=max_memory,
                tell=tell or _ignore,
            )


def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    options: QuantizeOptions,
    samples: Sequence[Sequence[int]],
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Quantise a model's blocks one after the other, and write a checkpoint.

    Only one block's activations are in memory. The model's weights become the quantised ones.

    Args:
        model: a decoder-only model in float32, on the CPU.
        tokenizer: its tokenizer, written beside it.
        out: the folder to write; an interrupted run into it goes on.
        options: how to quantise.
        samples: token ids, all of one length.
        progress: called with the layers done.

    Raises:
        QuantizeError: the model has no blocks, or activations that are not finite, or another
            process is writing to the folder.
    """
    with only_writer(out), _class_errors(model):
        return _quantize(
            model, tokenizer, out, options=options, samples=samples, progress=progress or _ignore
        )


@torch.inference_mode()
def _quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    options: QuantizeOptions,
    samples: Sequence[Sequence[int]],
    progress: Callable[[Progress], None],
    finish: Callable[[Widths, Mapping[str, float]], None] = lambda *_: None,
    weights: StreamedWeights | None = None,
    max_memory: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    names = hub_names(model) if weights is None else weights.names
    bits = loosest(options.widths) if options.size else options.bits
    if weights is None:
        with torch.inference_mode(mode=False):  # so that gradients can pass through them
            separate_experts(model)
    batches = _batches(samples, TUNED_TOKENS if options.effort == "best" else BATCH_TOKENS)
    blocks, short = find_blocks(model, bits), batches[0][:1, :SHORT]
    one_by_one = runs_by_blocks(model, blocks, short)
    if not one_by_one:
        if options.effort == "best":
            raise QuantizeError(
                f"the blocks of a {type(model).__name__} do not run one after the other, and best "
                "effort tunes them one by one",
                hint="quantise it with --effort standard",
            )
        _read_all(weights)
        weights = None
        blocks = decoder_blocks(model, short, bits)
    elif weights is not None:
        weights.release()
    left = left_out(blocks)
    if not any(linears(block) for block in blocks):
        raise QuantizeError(
            "none of its layers can be quantised: " + "; ".join(dict.fromkeys(left.values())),
            hint="take another width: 4 bits need multiples of 8, 8 bits multiples of 4",
        )
    tokens = sum(batch.numel() for batch in batches)
    hidden = (ModelShape.of_config(model.config).hidden_size or 0) if one_by_one else 0
    forecast = forecast_run(
        model,
        blocks,
        options,
        Samples(tokens, batches[0].numel(), hidden),
        streamed=0 if weights is None else weights.largest,
        limit=max_memory,
        tell=tell,
    )
    progress(Progress("memory", 1, 1, "blocks", str(forecast)))
    if forecast.tuned:
        _read_all(weights)
        weights = None
    read = None if weights is None else weights.tensor
    kept = KeptBlocks(out / KEPT, _fingerprint(model, options, samples, read))
    widths = Widths(options)
    if options.size:
        mixed = MixedWidths(model, blocks, names, options, tell, progress)
        widths = mixed.choose(kept, batches, by_blocks=one_by_one)
    tuner = ScaleTuner(model, blocks, batches if forecast.tuned else [], kept, progress, tell)
    work = Work(widths, progress, blocks, tokens=tokens)
    if one_by_one:
        spill = out / KEPT if forecast.on_disk else None
        quantized = by_blocks(model, blocks, batches, work, kept, spill=spill, weights=weights)
    else:
        quantized = at_once(model, blocks, batches, work, kept)
    packed, losses = {}, {}
    for i, path, weight in quantized:
        packed[path] = PackedLayer.of(weight, widths.of(path), partial(tuner.read_layer, i, path))
        losses[path] = weight.loss
    tuner.tune()
    write_checkpoint(
        model,
        tokenizer,
        packed,
        out,
        widths=widths,
        names=names,
        left=left,
        progress=progress,
        read=read,
    )
    finish(widths, losses)
    kept.remove()
    return out


def _read_all(weights: StreamedWeights | None) -> None:
    """Read all weights, to stay: none are streamed from now on."""
    if weights is not None:
        weights.load_all()


def _batches(samples: Sequence[Sequence[int]], tokens: int) -> list[torch.Tensor]:
    ids = torch.tensor([list(sample) for sample in samples])
    return list(ids.split(max(tokens // ids.shape[1], 1)))


def _fingerprint(
    model: PreTrainedModel,
    options: QuantizeOptions,
    samples: Sequence[Sequence[int]],
    read: Callable[[str], torch.Tensor] | None,
) -> str:
    """Sum up what a finished block depends on: this package, options, samples and the model."""
    digest = hashlib.sha256(version("gptq-loader-plugin").encode())
    digest.update(options.model_dump_json(exclude={"shard_bytes"}).encode())
    digest.update(json.dumps([list(sample) for sample in samples]).encode())
    digest.update(model.config.to_json_string(use_diff=True).encode())
    for name, parameter in model.named_parameters():
        tensor = parameter.detach() if read is None else read(name)
        digest.update(name.encode())
        digest.update(tensor.flatten()[:64].float().numpy().tobytes())
        digest.update(str(_bit_sum(tensor)).encode())
    return digest.hexdigest()


def _bit_sum(tensor: torch.Tensor) -> int:
    """Add up a tensor's numbers as integers, which is the same in any order and on any machine."""
    halves = tensor.contiguous().view(-1).view(torch.int16)
    return sum(int(part.sum(dtype=torch.int64)) for part in halves.split(SUMMED))


@contextmanager
def _class_errors(model: PreTrainedModel) -> Iterator[None]:
    """Raise `QuantizeError` for what a model's class raises when its blocks run one by one."""
    from transformers import __version__ as transformers_version

    try:
        yield
    except GPTQLoaderError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or not raised_in_transformers(error):
            raise
        words = " ".join(str(error).split())[:200]
        raise QuantizeError(
            f"{type(model).__name__} of transformers {transformers_version} does not run block by "
            f"block ({type(error).__name__}: {words})",
            hint="update transformers: pip install -U transformers; or quantise another version "
            "of this model",
        ) from error


def _check_free(out: Path) -> None:
    """Refuse a folder with something in it that no interrupted run has left."""
    ours = {KEPT_LOCK, lock_holder(out / KEPT_LOCK).name}
    if any(path.name not in ours for path in out.iterdir()) and not (out / KEPT).is_dir():
        raise QuantizeError(
            f"{out} is not empty, and a checkpoint would be mixed with what it holds",
            hint="name a new folder, or empty that one",
        )


def _ignore(_: object) -> None:
    """Ignore progress, and what is told."""
