"""Find the files that together hold one checkpoint's tensors; none is opened."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import (
    AmbiguousReference,
    CheckpointNotFound,
    CorruptCheckpoint,
    TensorMismatch,
)

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["WEIGHT_SUFFIXES", "find_weight_files"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|rng_state|adapter_model|consolidated).*", re.IGNORECASE
)
SHARD = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)")


def find_weight_files(folder: Path, *, base_name: str | None = None) -> list[Path]:
    """Find the files that together hold one checkpoint's tensors.

    An index file decides where there is one; else the name a config gives; else every shard of
    the one set there is; else the one file there is. safetensors win over pickles.

    Args:
        folder: the checkpoint's folder.
        base_name: `model_file_base_name` of the config, a file name without its suffix.

    Raises:
        CheckpointNotFound: there is no weight file.
        AmbiguousReference: several files could be the checkpoint.
        TensorMismatch: a shard that the index or the shards' names promise is missing.
        CorruptCheckpoint: the index does not parse.
    """
    for suffixes in ((".safetensors",), PICKLE_SUFFIXES):
        files = sorted(
            path
            for path in folder.iterdir()
            if path.is_file() and path.suffix in suffixes and not NOT_WEIGHTS.fullmatch(path.name)
        )
        indexes = sorted(
            path for suffix in suffixes for path in folder.glob(f"*{suffix}.index.json")
        )
        if len(indexes) == 1:
            return _indexed(indexes[0])
        if not files:
            continue
        named = [file for file in files if base_name and file.stem == base_name]
        if named:
            return named
        return _one_set(folder, files)
    raise _no_weights(folder)


def _no_weights(folder: Path) -> CheckpointNotFound:
    """Describe what is in a folder in place of weights."""
    what = f"{folder} holds no .safetensors, .pt or .bin file"
    hint = (
        "name the folder that holds the checkpoint's weights; if it came by git clone, install "
        "git-lfs and run git lfs pull"
    )
    inside = sorted(folder.iterdir())
    lost = [
        path
        for path in inside
        if path.suffix in WEIGHT_SUFFIXES and path.is_symlink() and not path.exists()
    ]
    if lost:
        what = f"{folder}: {lost[0].name} is a link to a file that is not there"
        hint = "download the checkpoint again, or put the file back"
    elif any(path.suffix == ".gguf" for path in inside):
        what += ", but GGUF ones"
        hint = "load GGUF files with llama.cpp, or look for a GPTQ version of this model"
    elif below := [path for path in inside if path.is_dir() and _has_weights(path)]:
        what += f"; its folder {below[0].name} does"
        hint = f"name that folder: {below[0]}"
    return CheckpointNotFound(what, reference=str(folder), tried=[str(folder)], hint=hint)


def _has_weights(folder: Path) -> bool:
    try:
        inside = {path.suffix for path in folder.iterdir()}
        return ".safetensors" in inside or ((folder / "config.json").is_file() and ".bin" in inside)
    except OSError:  # it may not be read
        return False


def _indexed(index: Path) -> list[Path]:
    hint = "download the checkpoint again; every shard must be there"
    try:
        table = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        names = sorted({str(name) for name in table.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"not a shard index ({error})", path=index, hint=hint) from error
    files = [index.parent / name for name in names]
    for file in files:
        if file.parent != index.parent:
            raise CorruptCheckpoint(
                f"it names a file of another folder, {file.name}", path=index, hint=hint
            )
        if not file.is_file():
            raise TensorMismatch(f"the shard {file.name} is missing", path=index, hint=hint)
    return files


def _one_set(folder: Path, files: list[Path]) -> list[Path]:
    shards = [(file, match) for file in files if (match := SHARD.fullmatch(file.name))]
    sets = {(match["stem"], match["total"], match["suffix"]) for _, match in shards}
    if len(sets) == 1 and len(shards) == len(files):
        present = {int(match["index"]) for _, match in shards}
        if missing := sorted(set(range(1, int(shards[0][1]["total"]) + 1)) - present):
            raise TensorMismatch(
                f"of {shards[0][1]['total']} shards, {missing} are missing",
                path=folder,
                hint="download the checkpoint again; every shard must be there",
            )
        return files
    if len(files) == 1:
        return files
    whole = [file for file in files if file.stem in ("model", "pytorch_model")]
    if len(whole) == 1:
        return whole
    raise AmbiguousReference(
        f"{folder} holds several checkpoints: {', '.join(file.name for file in files)}",
        reference=str(folder),
        tried=[file.name for file in files],
        hint="name the file itself instead of the folder",
    )
