"""Find the files that together hold one checkpoint's tensors.

A folder may hold several sets: the model a checkpoint was made of beside it, another's index, two
checkpoints. The one whose tensors are packed is the checkpoint; only where there are several sets
are headers looked at.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import (
    AmbiguousReference,
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    TensorMismatch,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["KEPT", "KEPT_LOCK", "WEIGHT_SUFFIXES", "WeightFiles", "find_weight_files"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|rng_state|adapter_model|consolidated).*", re.IGNORECASE
)
SHARD = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)")
# Names that GPTQ-for-LLaMa's and AutoGPTQ's files had: llama-7b-4bit-128g.pt, gptq_model-4bit.bin
GPTQ_NAME = re.compile(r"gptq|(?<!\d)[2-8]-?bit", re.IGNORECASE)
INDEX_BYTES = 1 << 26
STOCK_STEMS = ("model", "pytorch_model")
# What `quantize` has in a folder until the checkpoint there is whole: its blocks, and its lock.
KEPT = ".quantize"
KEPT_LOCK = ".quantize.lock"
AGAIN = "download the checkpoint again; every shard must be there"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of one checkpoint.

    Attributes:
        files: in the order of their names.
        warnings: what else lies in the folder and is not read, one sentence each.
    """

    files: list[Path]
    warnings: tuple[str, ...] = ()


def find_weight_files(
    folder: Path,
    *,
    base_name: str | None = None,
    is_packed: Callable[[list[Path]], bool] | None = None,
) -> WeightFiles:
    """Find the files that together hold one checkpoint's tensors.

    The name a config gives decides where such a file is there. Else every set of files is looked
    for: what an index names, shards of one set, a single file. Of several, the one that holds
    packed layers counts, safetensors before pickles; else the one with the usual name.

    Args:
        folder: the checkpoint's folder.
        base_name: `model_file_base_name` of the config, a file name with or without its suffix.
        is_packed: says whether safetensors files hold packed layers; None reads their headers.

    Raises:
        CheckpointNotFound: there is no weight file.
        AmbiguousReference: several files could be the checkpoint.
        TensorMismatch: a shard that an index or the shards' names promise is missing.
        CorruptCheckpoint: the index does not parse.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in WEIGHT_SUFFIXES
        and not NOT_WEIGHTS.fullmatch(path.name)
    )
    if base_name and (named := _named(files, base_name)):
        return WeightFiles(named)
    indexes = sorted(
        path
        for suffix in WEIGHT_SUFFIXES
        for path in folder.glob(f"*{suffix}.index.json")
        if path.is_file()
    )
    warnings: list[str] = []
    sets = _indexed_sets(indexes, files, warnings)
    indexed = {file for file_set in sets for file in file_set}
    sets += _other_sets(folder, [file for file in files if file not in indexed])
    if not sets:
        raise _no_weights(folder)
    chosen = _choose(folder, sets, is_packed or _holds_packed_layers)
    left = [file for file_set in sets if file_set is not chosen for file in file_set]
    alike = [file for file in left if file.suffix == chosen[0].suffix]
    if alike:
        warnings.append(
            f"{', '.join(file.name for file in alike[:3])} in the same folder "
            f"{'is' if len(alike) == 1 else 'are'} not of this checkpoint, and not read"
        )
    return WeightFiles(chosen, tuple(warnings))


def _named(files: list[Path], base_name: str) -> list[Path]:
    """Find the file a config names; of several suffixes the safest."""
    names = (base_name, *(f"{base_name}{suffix}" for suffix in WEIGHT_SUFFIXES))
    by_name = {file.name: file for file in files}
    return next(([by_name[name]] for name in names if name in by_name), [])


def _indexed_sets(indexes: list[Path], files: list[Path], warnings: list[str]) -> list[list[Path]]:
    """List the files that each index names; an index of another model is passed over."""
    sets: list[list[Path]] = []
    for index in indexes:
        named = _shards_of(index)
        present = [file for file in named if file.is_file()]
        if not present and files:
            warnings.append(
                f"{index.name} names files that are not here, and is not followed: it is another "
                "model's"
            )
        elif missing := [file for file in named if not file.is_file()]:
            raise TensorMismatch(f"the shard {missing[0].name} is missing", path=index, hint=AGAIN)
        else:
            sets.append(named)
    return sets


def _shards_of(index: Path) -> list[Path]:
    if (size := index.stat().st_size) > INDEX_BYTES:
        raise CorruptCheckpoint(f"not a shard index: it is {size:,} bytes", path=index, hint=AGAIN)
    try:
        table = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        names = sorted({str(name) for name in table.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"not a shard index ({error})", path=index, hint=AGAIN) from error
    for name in names:
        if (index.parent / name).parent != index.parent:
            raise CorruptCheckpoint(
                f"it names a file of another folder, {name}", path=index, hint=AGAIN
            )
    return [index.parent / name for name in names]


def _other_sets(folder: Path, files: list[Path]) -> list[list[Path]]:
    """List the sets of files that no index names: shards by their names, and single files."""
    shards: dict[tuple[str, str, str], dict[int, Path]] = {}
    single: list[list[Path]] = []
    for file in files:
        if match := SHARD.fullmatch(file.name):
            key = (match["stem"], match["total"], match["suffix"])
            shards.setdefault(key, {})[int(match["index"])] = file
        else:
            single.append([file])
    sets: list[list[Path]] = []
    for (_, total, _), parts in shards.items():
        if missing := sorted(set(range(1, int(total) + 1)) - parts.keys()):
            if len(shards) > 1 or single:
                continue  # what is left of another model
            raise TensorMismatch(
                f"of {total} shards, {missing} are missing", path=folder, hint=AGAIN
            )
        sets.append([parts[number] for number in sorted(parts)])
    return sets + single


def _choose(
    folder: Path, sets: list[list[Path]], is_packed: Callable[[list[Path]], bool]
) -> list[Path]:
    """Choose the set that is the checkpoint: the packed one, else the one with the usual name."""
    if len(sets) == 1:
        return sets[0]
    safe = [files for files in sets if files[0].suffix == ".safetensors"]
    pickled = [files for files in sets if files[0].suffix != ".safetensors"]
    packed = [files for files in safe if is_packed(files)] if pickled or len(safe) > 1 else safe
    by_name = [files for files in pickled if GPTQ_NAME.search(files[0].name)]
    unusual = [files for files in pickled if not _is_stock(files)]
    for candidates in (packed, by_name, unusual, safe, pickled):
        if len(candidates) == 1:
            return candidates[0]
        usual = [files for files in candidates if _is_stock(files)]
        if len(usual) == 1:
            return usual[0]
        if candidates:
            names = [file.name for files in candidates for file in files]
            raise AmbiguousReference(
                f"{folder} holds several checkpoints: {', '.join(names)}",
                reference=str(folder),
                tried=names,
                hint="name the file itself instead of the folder",
            )
    raise _no_weights(folder)


def _is_stock(files: list[Path]) -> bool:
    """Return whether a set has the name that transformers gives a model of its own."""
    match = SHARD.fullmatch(files[0].name)
    return (match["stem"] if match else files[0].stem) in STOCK_STEMS


def _holds_packed_layers(files: list[Path]) -> bool:
    """Return whether safetensors files hold a layer's packed codes, by their headers."""
    from gptq_loader_plugin.checkpoint.headers import read_headers

    try:
        return any(name.endswith(".qweight") for name in read_headers(files))
    except (CheckpointError, OSError):  # loading it says what is wrong
        return False


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
