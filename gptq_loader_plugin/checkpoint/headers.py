"""Read tensors' names, dtypes and shapes without reading tensors, and map their bytes.

safetensors files are a length, a JSON header and raw bytes
(https://github.com/huggingface/safetensors#format), so nothing but the header is read here, and
an integer tensor can be mapped as a numpy array. Pickles (`.pt`, `.bin`) need torch to be listed;
`pickles.py` reads those.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import (
    AmbiguousReference,
    CheckpointNotFound,
    CorruptCheckpoint,
    TensorMismatch,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = [
    "DAMAGED",
    "TensorInfo",
    "find_weight_files",
    "read_headers",
    "read_safetensors_header",
]

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
DAMAGED = "download the checkpoint again; if it stays so, it was published damaged"
HEADER_LIMIT = 100_000_000  # the format's own limit on a header's bytes
LFS_MARK = b"version https://git-lfs.github.com/spec/"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|rng_state|adapter_model|consolidated).*", re.IGNORECASE
)
SHARD = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, by its header.

    Attributes:
        name: its name in the file.
        dtype: as safetensors writes it: "I32", "F16", "BF16".
        shape: its dimensions.
        file: the file that holds it.
        start: where its bytes begin in the file; -1 in a pickle.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


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
            it
            for it in folder.iterdir()
            if it.is_file() and it.suffix in suffixes and not NOT_WEIGHTS.fullmatch(it.name)
        )
        indexes = sorted(it for suffix in suffixes for it in folder.glob(f"*{suffix}.index.json"))
        if len(indexes) == 1:
            return _indexed(indexes[0])
        if not files:
            continue
        named = [it for it in files if base_name and it.stem == base_name]
        if named:
            return named
        return _one_set(folder, files)
    raise _no_weights(folder)


def _no_weights(folder: Path) -> CheckpointNotFound:
    """Say what is in a folder in place of weights."""
    what = f"{folder} holds no .safetensors, .pt or .bin file"
    hint = (
        "name the folder that holds the checkpoint's weights; if it came by git clone, install "
        "git-lfs and run git lfs pull"
    )
    inside = sorted(folder.iterdir())
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    lost = [it for it in inside if it.suffix in suffixes and it.is_symlink() and not it.exists()]
    if lost:
        what = f"{folder}: {lost[0].name} is a link to a file that is not there"
        hint = "download the checkpoint again, or put the file back"
    elif any(it.suffix == ".gguf" for it in inside):
        what += ", but GGUF ones"
        hint = "load GGUF files with llama.cpp, or look for a GPTQ version of this model"
    elif below := [it for it in inside if it.is_dir() and _has_weights(it)]:
        what += f"; its folder {below[0].name} does"
        hint = f"name that folder: {below[0]}"
    return CheckpointNotFound(what, reference=str(folder), tried=[str(folder)], hint=hint)


def _has_weights(folder: Path) -> bool:
    try:
        inside = {it.suffix for it in folder.iterdir()}
        return ".safetensors" in inside or ((folder / "config.json").is_file() and ".bin" in inside)
    except OSError:  # it may not be read
        return False


def read_headers(files: Sequence[Path]) -> dict[str, TensorInfo]:
    """Read every tensor's header in `files`, checking that each lies inside its file.

    Args:
        files: safetensors files and pickles.

    Raises:
        CorruptCheckpoint: a file is cut short, is no safetensors file, or its header lies.
        UnsafeFile: a pickle holds more than tensors.
        TensorMismatch: two files hold a tensor of one name.
    """
    headers: dict[str, TensorInfo] = {}
    for file in files:
        for info in _read_file(file):
            if info.name in headers:
                raise TensorMismatch(
                    f"{info.name} is also in {headers[info.name].file.name}",
                    path=file,
                    tensor=info.name,
                    hint="keep the files of one checkpoint only in a folder",
                )
            headers[info.name] = info
    return headers


def _read_file(file: Path) -> Iterable[TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(len(LFS_MARK))
    if first == LFS_MARK:
        raise CorruptCheckpoint(
            f"this is a git-lfs pointer of {size} bytes, not the weights it points to",
            path=file,
            hint="install git-lfs, then run git lfs pull in that folder",
        )
    if file.suffix == ".safetensors":
        return _read_safetensors(file, size)
    from gptq_loader_plugin.checkpoint.pickles import read_pickle_headers

    return read_pickle_headers(file)


def _read_safetensors(file: Path, size: int) -> list[TensorInfo]:
    with file.open("rb") as stream:
        return read_safetensors_header(stream.read, file=file, size=size)


def read_safetensors_header(
    read: Callable[[int], bytes], *, file: Path, size: int
) -> list[TensorInfo]:
    """Read the header of a safetensors file that need not be on this machine.

    Args:
        read: gives the next bytes of the file, from its start on.
        file: the file, for messages and for what is made of it.
        size: the file's bytes.

    Raises:
        CorruptCheckpoint: it is no safetensors file, is cut short, or its header lies.
    """
    again = "download the file again; its size or its hash is not what was published"
    if size < 8:  # the length of the header
        raise CorruptCheckpoint(f"only {size} bytes long", path=file, hint=again)
    length = int.from_bytes(read(8), "little")
    if length > min(size - 8, HEADER_LIMIT):
        raise CorruptCheckpoint(
            f"its header claims {length:,} bytes, and the file has {size:,}",
            path=file,
            hint=again,
        )
    try:
        entries = json.loads(read(length))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"its header is not JSON ({error})", path=file, hint=again
        ) from error
    if not isinstance(entries, dict):
        raise CorruptCheckpoint("its header is not a table", path=file, hint=again)
    return [
        _tensor(file, name, entry, data=8 + length, size=size, again=again)
        for name, entry in entries.items()
        if name != "__metadata__"
    ]


def _tensor(
    file: Path,
    name: str,
    entry: Any,  # noqa: ANN401 - whatever the file says, until it is checked here
    *,
    data: int,
    size: int,
    again: str,
) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(it) for it in entry["shape"])
        start, end = (int(it) for it in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptCheckpoint(
            f"the header's entry for {name} is malformed", path=file, tensor=name, hint=again
        ) from error
    if dtype not in DTYPE_BYTES:
        raise CorruptCheckpoint(
            f"{name} has the unknown dtype {dtype}",
            path=file,
            tensor=name,
            hint="update gptq-loader-plugin, if this dtype is new",
        )
    info = TensorInfo(name, dtype, shape, file, data + start)
    if min((*shape, 0)) < 0 or start < 0 or end - start != info.nbytes:
        raise CorruptCheckpoint(
            f"the header gives {name} {end - start:,} bytes, and {dtype} {list(shape)} takes "
            f"{info.nbytes:,}",
            path=file,
            tensor=name,
            hint=again,
        )
    if data + end > size:
        raise CorruptCheckpoint(
            f"cut short: {name} ends at byte {data + end:,}, and the file has {size:,}",
            path=file,
            tensor=name,
            hint=again,
        )
    return info


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
        found = {int(match["index"]) for _, match in shards}
        if missing := sorted(set(range(1, int(shards[0][1]["total"]) + 1)) - found):
            raise TensorMismatch(
                f"of {shards[0][1]['total']} shards, {missing} are missing",
                path=folder,
                hint="download the checkpoint again; every shard must be there",
            )
        return files
    if len(files) == 1:
        return files
    whole = [it for it in files if it.stem in ("model", "pytorch_model")]
    if len(whole) == 1:
        return whole
    raise AmbiguousReference(
        f"{folder} holds several checkpoints: {', '.join(it.name for it in files)}",
        reference=str(folder),
        tried=[it.name for it in files],
        hint="name the file itself instead of the folder",
    )
