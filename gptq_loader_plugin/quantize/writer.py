"""Write a GPTQ checkpoint as AutoGPTQ and GPTQModel do."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.checkpoint.tensors import TORCH_NAMES
from gptq_loader_plugin.checkpoint.weight_files import KEPT
from gptq_loader_plugin.convert.pieces import DTYPE_BYTES, Info, Made, Piece
from gptq_loader_plugin.convert.safetensors_files import write_safetensors
from gptq_loader_plugin.errors import QuantizeError
from gptq_loader_plugin.model.experts import experts_layout
from gptq_loader_plugin.model.float32 import kept_in_float32
from gptq_loader_plugin.model.tensor_names import ExpertPlace, ModulePlace, Names
from gptq_loader_plugin.quantize.blocks import FUSED_EXPERTS, NOT_LINEAR
from gptq_loader_plugin.system.atomic_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.quantize.options import QuantizeOptions
    from gptq_loader_plugin.quantize.packed_layer import PackedLayer
    from gptq_loader_plugin.quantize.widths import Widths

__all__ = [
    "hub_names",
    "layer_names",
    "left_of",
    "plain_sizes",
    "save_tensors",
    "write_checkpoint",
]

INDEX = "model.safetensors.index.json"
FROM_TORCH = {"format": "pt"}
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
SAFETENSORS_NAMES = {
    getattr(torch, name): short for short, name in TORCH_NAMES.items() if short in DTYPE_BYTES
}
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
FULL = ("os error 28", "os error 27", "os error 122")  # as safetensors writes: disk, file, quota


def hub_names(model: PreTrainedModel) -> dict[str, str]:
    """Map every tensor's name in the hub's files to the module path or parameter in the model.

    transformers 5 renames and fuses some weights; files keep the names of their year. An expert's
    projection maps to its linear in `PackedExperts`, and has GPTQModel's name where the files of
    the family hold all experts as one tensor. What a file holds joined and the model does not
    (or the other way round) has the model's name. Call it before experts are separated.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = Names(model)
    state = model.state_dict()
    empty = {name: tensor.to("meta") for name, tensor in state.items()}
    mapped = {}
    for hub_name in revert_weight_conversion(model, empty):
        match names.place(hub_name):
            case ExpertPlace(parent=parent, expert=expert, role=role):
                if names.has_expert(parent, expert):
                    mapped[hub_name] = f"{parent}.experts.{expert}.{role}.weight"
            case ModulePlace(path=path):
                mapped[hub_name] = path
            case None:
                pass
    separate: dict[str, str] = {}
    for path, module in model.named_modules():
        layout = experts_layout(module)
        if layout is None:
            continue
        fused = {f"{path}.{name}" for name in layout.parameters}
        if any(own.startswith(f"{path}.experts.") for own in mapped.values()):
            continue
        hub = next((name for name, own in mapped.items() if own in fused), "")
        leaf = hub.rpartition(".")[2]
        parent = hub.removesuffix(f".{leaf}") if leaf in layout.parameters else path
        mapped = {name: own for name, own in mapped.items() if own not in fused}
        leaves = ("weight", "bias") if layout.bias else ("weight",)
        separate |= {
            f"{parent}.{i}.{role}_proj.{leaf}": f"{path}.experts.{i}.{role}.{leaf}"
            for i in range(layout.count)
            for role in layout.roles
            for leaf in leaves
        }
    placed = {own for own in mapped.values() if own in state}
    joined = {
        name: name for name in state if name not in placed and not _is_fused_expert(model, name)
    }
    return {**mapped, **separate, **joined}


def _is_fused_expert(model: PreTrainedModel, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    layout = experts_layout(model.get_submodule(path))
    return layout is not None and leaf in layout.parameters


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: Mapping[str, PackedLayer],
    out: Path,
    *,
    widths: Widths,
    names: Mapping[str, str],
    left: Mapping[str, str],
    progress: Callable[[Progress], None],
    read: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write tensors, configs and tokenizer; the weights' files appear only when complete.

    Args:
        model: the model; what is not in `packed` is written as float16.
        tokenizer: its tokenizer.
        packed: every quantised module's layer, by the module's path.
        out: the folder.
        widths: how each layer was quantised.
        names: from `hub_names`.
        left: the modules that are not quantised, by their path, and why.
        progress: called with the tensors written.
        read: reads a parameter that the model is without, by its path.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)  # an older checkpoint's: it is none any more
    for pattern in (".*.part", ".*.partial"):  # of a run that was killed while it wrote
        for unfinished in out.glob(pattern):
            unfinished.unlink()
    tokenizer.save_pretrained(out)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)
    hub, options = layer_names(names), widths.base
    unquantized = {hub.get(path, path): why for path, why in left.items()}
    quantization = _quantize_config(options, unquantized, widths.rules(hub))
    _write_json(out / "quantize_config.json", quantization)
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float16"
    pieces = _pieces(model, packed, names, read)
    _write_shards(pieces, out, shard_bytes=options.shard_bytes, progress=progress)
    # AutoRound's loader takes `meta` here for a format that it does not read.
    shared = {name: value for name, value in quantization.items() if name != "meta"}
    # The last file written: a folder with config.json is a finished checkpoint.
    _write_json(out / "config.json", {**config, "quantization_config": shared})


def left_of(folder: Path) -> dict[str, str]:
    """Read which layers of a checkpoint that was written here are not quantised, and why."""
    meta = read_json(folder / "quantize_config.json").get("meta")
    left = meta.get("not_quantized") if isinstance(meta, dict) else None
    return left if isinstance(left, dict) else {}


def _pieces(
    model: PreTrainedModel,
    packed: Mapping[str, PackedLayer],
    names: Mapping[str, str],
    read: Callable[[str], torch.Tensor] | None,
) -> list[Piece]:
    """Plan the tensors to write; each is read when its turn comes."""
    plain = _plain(model, packed, names)
    pieces: list[Piece] = []
    for hub_name, target in sorted(names.items(), key=lambda it: _counted(it[0])):
        path = target.removesuffix(".weight")
        if target.endswith(".weight") and path in packed:
            pieces.append(packed[path].piece(hub_name.removesuffix(".weight")))
        elif hub_name in plain:
            tensor, dtype = plain[hub_name]
            info = Info(SAFETENSORS_NAMES[dtype], tuple(tensor.shape))
            make = _read_as(hub_name, tensor, target, dtype, read)
            pieces.append(Piece(hub_name, {hub_name: info}, make))
    return pieces


def plain_sizes(
    model: PreTrainedModel, packed: Collection[str], names: Mapping[str, str]
) -> dict[str, int]:
    """Count the bytes of every tensor that is written unpacked, by its name in the file.

    Args:
        model: the model.
        packed: the paths of the modules that are quantised.
        names: from `hub_names`.
    """
    plain = _plain(model, packed, names)
    return {name: tensor.numel() * dtype.itemsize for name, (tensor, dtype) in plain.items()}


def layer_names(names: Mapping[str, str]) -> dict[str, str]:
    """Turn what `hub_names` returns round: a layer's name in the files by its path in the model."""
    return {
        path.removesuffix(".weight"): name.removesuffix(".weight") for name, path in names.items()
    }


def _plain(
    model: PreTrainedModel, packed: Collection[str], names: Mapping[str, str]
) -> dict[str, tuple[torch.Tensor, torch.dtype]]:
    """List what is written unpacked, with the dtype it is to have, by its name in the file."""
    state = model.state_dict()
    own = dict(model.named_parameters(remove_duplicate=False))
    tied = _tied_head(model)
    float32 = kept_in_float32(model, torch.float16)
    shared = {id(own[f"{path}.weight"]) for path in packed if f"{path}.weight" in own}
    plain: dict[str, tuple[torch.Tensor, torch.dtype]] = {}
    for hub_name, target in names.items():
        if target.endswith(".weight") and target.removesuffix(".weight") in packed:
            continue
        if target == tied or id(own.get(target)) in shared:
            continue
        tensor = state[target]
        dtype = tensor.dtype
        if tensor.is_floating_point():
            kept = float32 is not None and float32.search(target)
            dtype = torch.float32 if kept else torch.float16
        plain[hub_name] = (tensor, dtype)
    return plain


def _counted(name: str) -> str:
    """Return what sorts names in the order of the blocks: 2 before 10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(6), name)


def _read_as(
    name: str,
    tensor: torch.Tensor,
    target: str,
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor] | None,
) -> Callable[[], Made]:
    """Read a tensor that is not quantised, from the source's files where the model lacks it."""

    def make() -> Made:
        values = read(target) if read is not None and tensor.is_meta else tensor
        return Made({name: values.to(dtype)})

    return make


def _tied_head(model: PreTrainedModel) -> str | None:
    """Name the head's weight where it is the embedding's, which alone is written."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return next(
        (f"{name}.weight" for name, module in model.named_modules() if module is head), None
    )


def _write_shards(
    pieces: Sequence[Piece],
    out: Path,
    *,
    shard_bytes: int,
    progress: Callable[[Progress], None],
) -> None:
    """Write the weight files, a tensor at a time; each is in `out` once all are whole."""
    unfinished = out / KEPT / "weights"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write_safetensors(
            pieces,
            unfinished,
            shard_bytes=shard_bytes,
            progress=lambda it: progress(replace(it, stage="write")),
        )
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise _disk_full(out) from error
    files = sorted(unfinished.iterdir())
    names = {file.name for file in files}
    for old in out.iterdir():  # of an older checkpoint
        if (OURS.fullmatch(old.name) or old.name == INDEX) and old.name not in names:
            old.unlink()
    for file in files:
        file.replace(out / file.name)
    unfinished.rmdir()


def _disk_full(file: Path) -> QuantizeError:
    return QuantizeError(
        f"the disk is full: {file} could not be written",
        hint="free some disk space, then run the same command again: it goes on where it stopped",
    )


def save_tensors(
    tensors: dict[str, torch.Tensor], file: Path, *, metadata: Mapping[str, str] = FROM_TORCH
) -> None:
    """Write tensors to a file, which is there when it is whole.

    Args:
        tensors: by their names.
        file: the file.
        metadata: what else its header says.

    Raises:
        QuantizeError: the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = file.with_name(f".{file.name}.partial")
    try:
        save_file(tensors, partial, metadata=dict(metadata))
        partial.chmod(0o644)  # safetensors makes files that only their owner reads
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    except SafetensorError as error:
        if not any(text in str(error) for text in FULL):
            raise
        raise _disk_full(file) from error
    finally:
        partial.unlink(missing_ok=True)


def _quantize_config(
    options: QuantizeOptions, left: Mapping[str, str], rules: Mapping[str, dict[str, int]]
) -> dict[str, Any]:
    """Write the fields AutoGPTQ wrote, and those GPTQModel added.

    `dynamic` tells other loaders which linears are not quantised (routers none of them expects),
    and which have other widths.
    """
    linears = [name for name, why in left.items() if why not in (NOT_LINEAR, FUSED_EXPERTS)]
    dynamic = {**{f"-:{re.escape(name)}$": {} for name in linears}, **rules}
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "damp_percent": options.damp_percent,
        "desc_act": options.desc_act,
        "static_groups": options.order == "static",
        "sym": options.sym,
        "true_sequential": options.true_sequential,
        "lm_head": False,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "checkpoint_format": options.checkpoint_format,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"gptq_loader_plugin:{version('gptq-loader-plugin')}"],
            "damp_percent": options.damp_percent,
            "static_groups": options.order == "static",
            "true_sequential": options.true_sequential,
            **({"not_quantized": dict(left)} if left else {}),
        },
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=2) + "\n")
