"""Convert a checkpoint: plan it from headers, write beside the target, and rename at the end."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import CONFIG_FILES, read_json
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.convert.awq import plan_awq
from gptq_loader_plugin.convert.compressed import plan_compressed
from gptq_loader_plugin.convert.dense import plan_dense
from gptq_loader_plugin.convert.gguf_file import write_gguf
from gptq_loader_plugin.convert.gptq import plan_gptq, plan_same
from gptq_loader_plugin.convert.pieces import Conversion
from gptq_loader_plugin.convert.safetensors_files import write_safetensors
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.reference import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.convert.options import ConvertOptions
    from gptq_loader_plugin.convert.pieces import Planned
    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["convert_checkpoint"]

PLANNERS: dict[str, Callable[[Checkpoint, ConvertOptions], Planned]] = {
    "awq": plan_awq,
    "compressed-tensors": plan_compressed,
    "dense": plan_dense,
    "gptq": plan_gptq,
    "gptq_v2": plan_gptq,
    "safetensors": plan_same,
}
# What goes along as it is: tokenizers, templates, cards and code; weights and their index do not.
COMPANIONS = (".json", ".txt", ".model", ".jinja", ".py", ".md", ".tiktoken", ".vocab")
LARGEST_COMPANION = 1 << 28


def convert_checkpoint(
    reference: str | Path,
    out: Path,
    *,
    options: ConvertOptions,
    plugins: Plugins,
    revision: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Write a checkpoint in another format, a layer at a time.

    Args:
        reference: what to convert, as for `load`.
        out: the folder to write; for GGUF a file, or a folder to put one into.
        options: the format and what belongs to it.
        plugins: the plugins in force.
        revision: as for `load`.
        progress: called with the tensors done.

    Raises:
        OptionInvalid: there is something at `out` already.
        UnsupportedFormat: the format cannot hold this checkpoint.
        GPTQLoaderError: the checkpoint cannot be read; see `errors`.
    """
    progress = progress or plugins.progress
    path = resolve(reference, plugins=plugins, revision=revision, progress=progress)
    checkpoint = open_checkpoint(path, plugins.readers())
    try:
        if options.format == "gguf":
            return _to_gguf(checkpoint, out, options, progress)
        return _to_folder(checkpoint, out, options, progress)
    finally:
        checkpoint.close()


def _to_gguf(
    checkpoint: Checkpoint,
    out: Path,
    options: ConvertOptions,
    progress: Callable[[Progress], None],
) -> Conversion:
    file = out
    if out.suffix != ".gguf":
        file = out / f"{checkpoint.folder.resolve().name}.gguf"
    _check_free(file)
    with _beside(file) as partial:
        partial.parent.mkdir(parents=True, exist_ok=True)
        layers, notes = write_gguf(checkpoint, partial, options=options, progress=progress)
    return Conversion(
        path=file,
        format=options.format,
        layers=tuple(layers),
        source_bytes=checkpoint.size_bytes,
        written_bytes=file.stat().st_size,
        warnings=(*checkpoint.warnings, *notes),
    )


def _to_folder(
    checkpoint: Checkpoint,
    out: Path,
    options: ConvertOptions,
    progress: Callable[[Progress], None],
) -> Conversion:
    _check_free(out)
    planned = PLANNERS[options.format](checkpoint, options)
    with _beside(out) as partial:
        partial.mkdir(parents=True)
        layers = write_safetensors(
            planned.pieces, partial, shard_bytes=options.shard_bytes, progress=progress
        )
        _copy_companions(checkpoint, partial)
        _write_configs(checkpoint, planned, partial)
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Conversion(
        path=out,
        format=options.format,
        layers=tuple(layers),
        source_bytes=checkpoint.size_bytes,
        written_bytes=written,
        warnings=(*checkpoint.warnings, *planned.warnings),
    )


def _check_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise OptionInvalid(
            f"{out} is there already", hint="name another place, or remove it first"
        )


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Give a path beside `out` to write to; it takes the name at the end, or goes."""
    partial = out.with_name(f".{out.name}.partial")
    _remove(partial)  # of a run that was killed
    try:
        yield partial
        if out.is_dir():
            out.rmdir()  # which is empty
        partial.replace(out)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    weights = {info.file for info in checkpoint.headers.values()}
    left = {"config.json", *CONFIG_FILES}
    for file in sorted(checkpoint.folder.iterdir()):
        is_index = file.name.endswith(".index.json")
        if file in weights or is_index or file.name in left or file.name.startswith("."):
            continue
        small = file.is_file() and file.stat().st_size < LARGEST_COMPANION
        if small and file.suffix in COMPANIONS:
            shutil.copyfile(file, folder / file.name)


def _write_configs(checkpoint: Checkpoint, planned: Planned, folder: Path) -> None:
    file = checkpoint.folder / "config.json"
    config: dict[str, Any] = read_json(file) if file.is_file() else {}
    config.pop("quantization_config", None)
    if planned.dtype is not None:
        old = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[old] = planned.dtype
    if planned.quantization is not None:
        config["quantization_config"] = planned.quantization
        if planned.quantization["quant_method"] == "gptq":
            _write_json(folder / CONFIG_FILES[0], planned.quantization)
    if file.is_file():
        _write_json(folder / "config.json", config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
