"""Load, explain and inspect: the steps in the order data flows."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.errors import CheckpointError, OptionInvalid
from gptq_loader_plugin.events import Head, LoadRequest
from gptq_loader_plugin.placement import place
from gptq_loader_plugin.plan import make_plan
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.reference import resolve
from gptq_loader_plugin.template_source import find_template

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from gptq_loader_plugin.build import FilledModel
    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Device
    from gptq_loader_plugin.loaded import LoadedModel
    from gptq_loader_plugin.plan import Plan
    from gptq_loader_plugin.report import CheckpointReport
    from gptq_loader_plugin.template import Template

__all__ = ["explain", "inspect", "load", "load_model"]

DTYPES = ("float32", "float16", "bfloat16")
COPY_TOKENIZER = (
    "copy tokenizer.json (or tokenizer.model) and tokenizer_config.json from the model this was "
    "made of"
)
UNKNOWN_CONTEXT = 2048  # a model that does not say how long its context is

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A load that was planned: when it began, what was asked, the checkpoint, and the plan."""

    began: float
    request: LoadRequest
    checkpoint: Checkpoint
    plan: Plan


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
        head: "int8" makes the output head 8-bit at load: faster, and a little less exact; None,
            as "stored", leaves it as it is.
        check: whether to check the kernels and the logits once loaded.
        device_map: over several devices: "auto" fills those of `max_memory` in order, block by
            block; or a place for each part of the model, {"": "cpu", "model.layers.0": "disk"}.
        max_memory: the most bytes of weights in each place, {"cuda:0": "8GB", "cpu": "10GB",
            "disk": ""}; None takes the devices of this machine.
        offload_folder: where the weights go whose place is the disk. They are computed with on
            the CPU, and read whenever they are needed.
        kv_cache: "int8" keeps the context's keys and values in 8 bits, half the memory, slower
            and less exact; needs the package hqq. None keeps them in the model's dtype.
        plugins: the plugins in force; None takes those installed.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    plugins = plugins or Plugins(installed=True)
    if kv_cache not in (None, "int8"):
        raise OptionInvalid(
            f"a context cannot be kept as {kv_cache!r}", hint='write "int8", or leave it out'
        )
    if head is not None and head not in get_args(Head):
        raise OptionInvalid(f"no head is {head!r}", hint=f"name {' or '.join(get_args(Head))}")
    opened = _open(
        reference,
        plugins,
        device=device,
        backend=backend,
        dtype=dtype,
        revision=revision,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
        int8_cache=kv_cache == "int8",
    )
    checkpoint, plan = opened.checkpoint, opened.plan
    chosen = find_template(
        checkpoint.folder, card=checkpoint.card, named=template, offered=plugins.templates()
    )
    tokenizer = _tokenizer(checkpoint)
    if kv_cache == "int8":
        from gptq_loader_plugin.kv_cache import check_int8
        from gptq_loader_plugin.skeleton import read_config

        check_int8(read_config(checkpoint))
    from gptq_loader_plugin.build import build_model

    filled = build_model(checkpoint, plan, plugins, offload_folder, check=check)
    model, notes = filled.model, filled.notes
    if head == "int8":
        from gptq_loader_plugin.head import narrow_head

        note, grown = narrow_head(model, plan.device, plugins.kernels(), only=backend)
        plan = replace(plan, weight_bytes=plan.weight_bytes + grown)
        notes = (*notes, note)
    _tell_loaded(opened, plugins)
    from gptq_loader_plugin.loaded import LoadedModel

    loaded = LoadedModel(
        model,
        tokenizer,
        plan=plan,
        template=chosen,
        card=checkpoint.card,
        context=_context(model, context),
        warnings=filled.warnings,
        notes=notes,
        kv_cache=kv_cache,
    )
    _never_sample_padding(loaded)
    return loaded


def load_model(
    path: Path,
    *,
    reference: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, str] | None = None,
    max_memory: Mapping[str, str | int] | None = None,
    offload_folder: str | Path | None = None,
    config: PreTrainedConfig | None = None,
    model_class: type[PreTrainedModel] | None = None,
    check: bool = True,
    plugins: Plugins | None = None,
) -> FilledModel:
    """Load the transformers model alone, without tokenizer or template: for a host.

    Args:
        path: the checkpoint's folder or file.
        reference: what the user typed, where that is not the path.
        device: as for `load`, and so are the options down to `offload_folder`.
        backend: as for `load`.
        dtype: as for `load`.
        device_map: as for `load`.
        max_memory: as for `load`.
        offload_folder: as for `load`.
        config: the model's config, where it is not what config.json says.
        model_class: the class to build; None takes transformers' own for the config.
        check: as for `load`.
        plugins: as for `load`.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    plugins = plugins or Plugins(installed=True)
    opened = _open(
        path,
        plugins,
        named=reference,
        device=device,
        backend=backend,
        dtype=dtype,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
    )
    from gptq_loader_plugin.build import build_model

    filled = build_model(
        opened.checkpoint,
        opened.plan,
        plugins,
        offload_folder,
        check=check,
        config=config,
        model_class=model_class,
    )
    _tell_loaded(opened, plugins)
    return filled


def explain(
    reference: str | Path,
    *,
    device: str | None = None,
    backend: str | None = None,
    revision: str | None = None,
    device_map: str | Mapping[str, str] | None = None,
    max_memory: Mapping[str, str | int] | None = None,
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
        plugins: as for `load`.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    plugins = plugins or Plugins(installed=True)
    where = _device(device, device_map, max_memory)
    path = resolve(reference, plugins=plugins, revision=revision, download=False)
    return _plan(
        open_checkpoint(path, plugins.readers()),
        where,
        plugins,
        reference=str(reference),
        backend=backend,
        device_map=device_map,
        max_memory=max_memory,
    )


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
    from gptq_loader_plugin.report import make_report

    plugins = plugins or Plugins(installed=True)
    path = resolve(reference, plugins=plugins, revision=revision, download=False)
    checkpoint = open_checkpoint(path, plugins.readers())
    return make_report(checkpoint, plugins.kernels(), reference=str(reference))


def _device(
    device: str | None,
    device_map: str | Mapping[str, str] | None,
    max_memory: Mapping[str, str | int] | None,
) -> Device:
    """Find the one device, or the first of several: where a model's beginning and end are."""
    if device_map is None:
        if max_memory:
            raise OptionInvalid(
                "memory limits are for a model over several devices",
                hint='ask for that: device_map="auto", or --device-map auto',
            )
        return find_device(device)
    if device is not None:
        raise OptionInvalid(
            "a device and a device map were asked for",
            hint="name one of them; a device map names its own devices",
        )
    first = next(iter(max_memory or {}), None)
    if not isinstance(device_map, str):
        first = device_map.get("", next(iter(device_map.values()), None))
    return find_device("cpu" if first == "disk" else first)


def _check_present(device: Device) -> None:
    if not device.present:
        raise OptionInvalid(
            f"{device} is not on this machine", hint="load on one that is; explain takes any"
        )


def _open(
    reference: str | Path,
    plugins: Plugins,
    *,
    named: str | None = None,
    device: str | None,
    backend: str | None,
    dtype: str | torch.dtype | None,
    revision: str | None = None,
    device_map: str | Mapping[str, str] | None,
    max_memory: Mapping[str, str | int] | None,
    offload_folder: str | Path | None,
    int8_cache: bool = False,
) -> _Opened:
    """Find a checkpoint, open it and plan its load, on devices that are here."""
    began = time.monotonic()
    where = _device(device, device_map, max_memory)
    _check_present(where)
    dtype_name = None if dtype is None else _dtype_name(dtype)
    path = resolve(reference, plugins=plugins, revision=revision)
    request = LoadRequest(named or str(reference), path, str(where), backend)
    plugins.hook.gptq_before_load(request=request)
    checkpoint = open_checkpoint(path, plugins.readers())
    plan = _plan(
        checkpoint,
        where,
        plugins,
        reference=request.reference,
        backend=backend,
        dtype=dtype_name,
        device_map=device_map,
        max_memory=max_memory,
        int8_cache=int8_cache,
    )
    for placed in plan.placed.values():
        _check_present(placed.device)
    if offload_folder is None and any(it.on_disk for it in plan.placed.values()):
        raise OptionInvalid(
            "a part of the model is to stay on the disk, and no folder is named for it",
            hint="name one on a fast disk: offload_folder=FOLDER, or --offload-folder FOLDER",
        )
    return _Opened(began, request, checkpoint, plan)


def _plan(
    checkpoint: Checkpoint,
    where: Device,
    plugins: Plugins,
    *,
    reference: str,
    backend: str | None,
    dtype: str | None = None,
    device_map: str | Mapping[str, str] | None = None,
    max_memory: Mapping[str, str | int] | None = None,
    int8_cache: bool = False,
) -> Plan:
    placed = None
    if device_map is not None:
        placed = place(
            checkpoint,
            plugins.kernels(),
            device_map=device_map,
            max_memory=max_memory,
            backend=backend,
        )
    return make_plan(
        checkpoint,
        where,
        plugins.kernels(),
        reference=reference,
        backend=backend,
        dtype=dtype,
        placed=placed,
        int8_cache=int8_cache,
    )


def _tell_loaded(opened: _Opened, plugins: Plugins) -> None:
    opened.checkpoint.close()
    seconds = time.monotonic() - opened.began
    plugins.hook.gptq_after_load(request=opened.request, seconds=seconds)
    named, headline = opened.request.reference, opened.plan.headline()
    logger.info("loaded %s in %.1f s: %s", named, seconds, headline)


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=False
        )
        usable = len(tokenizer) > 0 and bool(tokenizer("a")["input_ids"])
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the tokenizer cannot be read ({first[:200]})",
            path=checkpoint.folder,
            hint=f"{COPY_TOKENIZER}; tokenizer.model needs pip install sentencepiece protobuf",
        ) from error
    if not usable:
        raise CheckpointError(
            "there is no tokenizer",
            path=checkpoint.folder,
            hint=COPY_TOKENIZER,
        )
    return tokenizer


def _context(model: PreTrainedModel, asked: int | None) -> int:
    config: Any = model.config.get_text_config()
    longest = next(
        (
            value
            for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
            if isinstance(value := getattr(config, name, None), int)
        ),
        UNKNOWN_CONTEXT,
    )
    if asked is not None and not 1 < asked <= longest:
        raise OptionInvalid(
            f"a context of {asked:,} tokens was asked for; this model takes 2 to {longest:,}",
            hint="ask for less, or leave context out",
        )
    return asked or longest


def _never_sample_padding(loaded: LoadedModel) -> None:
    """Keep `model.generate()` off the ids past the tokenizer too."""
    padding = list(loaded._padding_ids())  # noqa: SLF001 - the same set for both ways to generate
    config: Any = loaded.model.generation_config
    if padding and config is not None:
        config.suppress_tokens = padding


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise OptionInvalid(f"no model computes in {name}", hint=f"name one of {', '.join(DTYPES)}")
    return name
