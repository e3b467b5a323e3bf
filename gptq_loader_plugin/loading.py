"""Load, explain and inspect: the steps in the order data flows."""

from __future__ import annotations

import logging
import os
import time
from codecs import BOM_UTF8
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.chat.tokenizer import read_tokenizer
from gptq_loader_plugin.checkpoint.architectures.translate import translate
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.checkpoint.vocabulary import embedding_rows
from gptq_loader_plugin.errors import ConfigInvalid, OptionInvalid
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.model.top_logits import add_top_logits
from gptq_loader_plugin.opening import open_planned, plan_load
from gptq_loader_plugin.planning.model_shape import ModelShape
from gptq_loader_plugin.planning.top_logits import plan_top_logits
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.reference import resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from gptq_loader_plugin.catalog.report import CheckpointReport
    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.events import Head
    from gptq_loader_plugin.generation.engine import Engine
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.model.build import FilledModel
    from gptq_loader_plugin.opening import Opened
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["explain", "inspect", "load", "load_model"]

ENGINE_VARIABLE = "GPTQ_LOADER_ENGINE"
UNKNOWN_CONTEXT = 2048  # a model that does not say how long its context is

logger = logging.getLogger(__name__)


def load(  # noqa: PLR0913 - each is an option a user may want
    reference: str | Path,
    *,
    device: str | None = None,
    backend: str | None = None,
    dtype: str | torch.dtype | None = None,
    template: str | Template | None = None,
    revision: str | None = None,
    context: int | None = None,
    head: Head | None = None,
    check: bool = True,
    device_map: str | Mapping[str, str] | None = None,
    max_memory: Mapping[str, str | int] | None = None,
    offload_folder: str | Path | None = None,
    kv_cache: Literal["int8"] | None = None,
    draft: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
    options: LoadOptions | None = None,
    plugins: Plugins | None = None,
) -> LoadedModel:
    """Load a GPTQ checkpoint.

    Args:
        reference: a folder, a file, a folder's name in the models directory, `owner/repo:branch`,
            or "demo".
        device: "cpu", "cuda", "cuda:1", "mps", "xpu"; None takes the best there is.
        backend: a kernel's name, for every layer or not at all; None chooses layer by layer.
        dtype: the dtype of what is not quantised; None lets the kernels say.
        template: a template, its name, a .jinja file or jinja text; None finds the checkpoint's.
        revision: the branch, tag or commit on the hub.
        context: the longest sequence; None takes what config.json says.
        head: "int8" makes the output head 8-bit at load: less memory and a little less exact;
            "stored" leaves it as it is; None does too, and picks tokens faster by a copy of it in
            8 bits, where a kernel can: the same tokens.
        check: whether to check the kernels and the logits once loaded.
        device_map: over several devices: "auto" fills those of `max_memory` in order, block by
            block; or a place for each part of the model, {"": "cpu", "model.layers.0": "disk"}.
        max_memory: the most bytes of weights in each place, {"cuda:0": "8GB", "cpu": "10GB",
            "disk": ""}, or "cuda:0=8GB,cpu=10GB,disk"; None takes the devices of this machine.
        offload_folder: where the weights go whose place is the disk. They are computed with on
            the CPU, and read whenever they are needed.
        kv_cache: "int8" keeps the context's keys and values in 8 bits: half the memory, a little
            less exact. None keeps them in the model's dtype.
        draft: a smaller checkpoint with the same tokens, whose guesses are read several in a step
            and kept where they are what is picked anyway; or "ngram", which guesses that what
            followed the same words before follows again; or "none". None is "ngram" where a step
            of several tokens has the numbers of several steps, as the native ones on a CPU have.
        lora: LoRA adapters, as peft saves them, beside the model: {name: folder}, or "name=folder",
            or folders. One that is alone is used for every reply; of several, `model.adapter`
            names the one to use.
        options: all of the above in one; in place of them.
        plugins: the plugins in force; None takes those installed.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    plugins = plugins or Plugins(installed=True)
    options = _one_set(
        options,
        LoadOptions(
            device=device,
            backend=backend,
            dtype=dtype,
            template=template,
            revision=revision,
            context=context,
            head=head,
            check=check,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            kv_cache=kv_cache,
            draft=draft,
            lora=lora,
        ),
    )
    opened = open_planned(reference, options, plugins)
    checkpoint, plan = opened.checkpoint, opened.plan
    chat_template = find_template(
        checkpoint.folder,
        card=checkpoint.card,
        named=options.template,
        offered=plugins.templates(),
        rows=embedding_rows(checkpoint.headers),
    )
    from gptq_loader_plugin.checkpoint.transformers_config import read_config
    from gptq_loader_plugin.generation.kv_cache import check_int8, make_int8_cache
    from gptq_loader_plugin.generation.speculation import NOTE
    from gptq_loader_plugin.model.adapter_files import read_adapters
    from gptq_loader_plugin.model.build import build_model

    _check_marks(checkpoint.folder)
    config = read_config(checkpoint)  # before the tokenizer, which would be blamed for it
    tokenizer = read_tokenizer(checkpoint)
    int8 = options.kv_cache == "int8"
    if int8 and not _wants_engine(plan):
        check_int8(config)
    adapter_files = read_adapters(options.adapters, plugins)
    filled = build_model(checkpoint, plan, plugins, options.offload_folder, check=options.check)
    model, plan, notes = filled.model, filled.plan, filled.notes
    if options.head == "int8":
        from gptq_loader_plugin.model.int8_head import quantize_head

        note, grown = quantize_head(model, plan.device, plugins.kernels(), only=options.backend)
        plan = replace(plan, weight_bytes=plan.weight_bytes + grown)
        notes = (*notes, note)
    if options.head is None:
        plan, done = add_top_logits(model, plan, plugins.kernels())
        notes = (*notes, *done)
    _report_loaded(opened, plugins)
    context_tokens = _context(plan, model, options.context)
    engine, done = _make_engine(filled, options, plugins, context_tokens)
    notes = (*notes, *done)
    if int8 and engine is None:
        make_int8_cache(model)  # refuses here, and not at the first reply
        notes = (*notes, "keeps keys and values in 8 bits: half the memory for a context")
    exact = filled.batcher is not None and engine is None and not adapter_files
    guesses = _load_draft(options, tokenizer, plugins, exact=exact)
    if guesses == "ngram":
        notes = (*notes, NOTE)
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.model.adapters import Adapters

    adapters = Adapters.of(model, adapter_files) if adapter_files else None
    notes = (*notes, *(adapters.notes if adapters else ()))
    loaded = LoadedModel(
        model,
        tokenizer,
        plan=plan,
        template=chat_template,
        card=checkpoint.card,
        context=context_tokens,
        warnings=filled.warnings,
        notes=notes,
        batcher=filled.batcher,
        engine=engine,
        kv_cache="int8" if int8 and engine is None else None,
        draft=guesses,
        adapters=adapters,
    )
    if len(adapter_files) == 1:
        (loaded.adapter,) = adapter_files
    _never_sample_padding(loaded)
    return loaded


def _load_draft(
    options: LoadOptions, tokenizer: PreTrainedTokenizerBase, plugins: Plugins, *, exact: bool
) -> LoadedModel | Literal["ngram"] | None:
    """Load the checkpoint that guesses, where there is one.

    Args:
        options: how to load.
        tokenizer: of the model that it guesses for.
        plugins: the plugins in force.
        exact: whether guessed tokens, read beside others, have the numbers that they have alone.

    Raises:
        OptionInvalid: its tokens are others.
    """
    if options.draft == "none" or (options.draft is None and not exact):
        return None
    if options.draft is None or options.draft == "ngram":
        return "ngram"
    own = LoadOptions(device=options.device, dtype=options.dtype, check=options.check, draft="none")
    draft = load(options.draft, options=own, plugins=plugins)
    if draft.tokenizer.get_vocab() != tokenizer.get_vocab():
        draft.close()
        raise OptionInvalid(
            f"{options.draft} has other tokens than the model that it is to guess for",
            hint="name a smaller model of the same family, or leave --draft out",
        )
    return draft


def _make_engine(
    filled: FilledModel, options: LoadOptions, plugins: Plugins, context: int
) -> tuple[Engine | None, tuple[str, ...]]:
    """Make what writes many replies in one pass, on an accelerator; say what was found."""
    if not _wants_engine(filled.plan):
        return None, ()
    attention = plugins.hook.gptq_paged_attention(device=filled.plan.device)
    if attention is None:
        return None, ("replies are written one after the other: no plugin offers paged attention",)
    from gptq_loader_plugin.engine.make_engine import make_engine

    int8 = options.kv_cache == "int8"
    engine, note = make_engine(filled.model, attention, context, int8=int8)
    return engine, (note,)


def _wants_engine(plan: Plan) -> bool:
    """Return whether an engine is to be made: on one accelerator, or where somebody says so."""
    forced = os.environ.get(ENGINE_VARIABLE)
    active = plan.device.type != "cpu" if forced not in ("0", "1") else forced == "1"
    return active and len({place.device.torch_name for place in plan.placed.values()}) < 2


def _one_set(options: LoadOptions | None, arguments: LoadOptions) -> LoadOptions:
    """Return the options that a call gives, in one of the two ways."""
    if options is None:
        return arguments
    if arguments != LoadOptions():
        raise OptionInvalid(
            "options are given as LoadOptions and as arguments",
            hint="give them in one of the two ways",
        )
    return options


def load_model(
    path: Path,
    options: LoadOptions,
    *,
    reference: str | None = None,
    config: PreTrainedConfig | None = None,
    model_class: type[PreTrainedModel] | None = None,
    plugins: Plugins | None = None,
) -> FilledModel:
    """Load the transformers model alone, without tokenizer or template: for a host.

    Args:
        path: the checkpoint's folder or file.
        options: how to load it; `template`, `context`, `head` and `kv_cache` have no effect.
        reference: what the user typed, where that is not the path.
        config: the model's config, where it is not what config.json says.
        model_class: the class to build; None takes transformers' own for the config.
        plugins: as for `load`.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    plugins = plugins or Plugins(installed=True)
    opened = open_planned(path, options, plugins, named=reference)
    from gptq_loader_plugin.model.build import build_model

    filled = build_model(
        opened.checkpoint,
        opened.plan,
        plugins,
        options.offload_folder,
        check=options.check,
        config=config,
        model_class=model_class,
    )
    _report_loaded(opened, plugins)
    return filled


def explain(
    reference: str | Path,
    *,
    device: str | None = None,
    backend: str | None = None,
    revision: str | None = None,
    device_map: str | Mapping[str, str] | None = None,
    max_memory: Mapping[str, str | int] | None = None,
    options: LoadOptions | None = None,
    plugins: Plugins | None = None,
) -> Plan:
    """Plan a load without reading weights, for this machine or another.

    Args:
        reference: as for `load`; a hub repository must be on this machine.
        device: as for `load`, or one that is not here: "cuda:sm86", "rocm:gfx1100".
        backend: as for `load`.
        revision: as for `load`.
        device_map: as for `load`, with devices that need not be here.
        max_memory: as for `load`: {"cuda:sm86": "8GB", "cpu": "16GB"}.
        options: as for `load`.
        plugins: as for `load`.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    plugins = plugins or Plugins(installed=True)
    options = _one_set(
        options,
        LoadOptions(
            device=device,
            backend=backend,
            revision=revision,
            device_map=device_map,
            max_memory=max_memory,
        ),
    )
    path = resolve(reference, plugins=plugins, revision=options.revision, download=False)
    checkpoint = translate(open_checkpoint(path, plugins.readers()))
    plan = plan_load(checkpoint, options, plugins, reference=str(reference))
    return plan_top_logits(plan, checkpoint, plugins.kernels())


def inspect(
    reference: str | Path, *, revision: str | None = None, plugins: Plugins | None = None
) -> CheckpointReport:
    """Report on a checkpoint from its headers: what it is, and where each fact came from.

    Args:
        reference: as for `load`; a hub repository must be on this machine.
        revision: as for `load`.
        plugins: as for `load`.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    from gptq_loader_plugin.catalog.report import make_report

    plugins = plugins or Plugins(installed=True)
    path = resolve(reference, plugins=plugins, revision=revision, download=False)
    checkpoint = open_checkpoint(path, plugins.readers())
    return make_report(checkpoint, plugins.kernels(), reference=str(reference))


def _report_loaded(opened: Opened, plugins: Plugins) -> None:
    opened.checkpoint.close()
    seconds = time.monotonic() - opened.began
    plugins.hook.gptq_after_load(request=opened.request, seconds=seconds)
    named, headline = opened.request.reference, opened.plan.headline()
    logger.info("loaded %s in %.1f s: %s", named, seconds, headline)


def _check_marks(folder: Path) -> None:
    """Refuse a byte-order mark, which editors on Windows write and transformers does not read."""
    for file in sorted(folder.glob("*.json")):
        with file.open("rb") as stream:
            if stream.read(len(BOM_UTF8)) == BOM_UTF8:
                raise ConfigInvalid(
                    "begins with a byte-order mark, which transformers does not read",
                    path=file,
                    hint="save it as UTF-8 without the mark (BOM), or download it again",
                )


def _context(plan: Plan, model: PreTrainedModel, requested: int | None) -> int:
    shape = plan.shape if plan.shape.context else ModelShape.of_config(model.config)
    meant = shape.context or UNKNOWN_CONTEXT
    longest = max(shape.longest_context or meant, meant)
    if requested is not None and not 1 < requested <= longest:
        raise OptionInvalid(
            f"a context of {requested:,} tokens was asked for; this model takes 2 to {longest:,}",
            hint="ask for less, or leave context out",
        )
    return requested or meant


def _never_sample_padding(loaded: LoadedModel) -> None:
    """Keep `model.generate()` off the ids past the tokenizer too."""
    padding = list(loaded.token_ids.padding_ids())  # the same for both ways to generate
    config: Any = loaded.model.generation_config
    if padding and config is not None:
        config.suppress_tokens = padding
