"""Read tensors' names, dtypes and shapes without reading tensors, and map their bytes.

safetensors files are a length, a JSON header and raw bytes
(https://github.com/huggingface/safetensors#format), so nothing but the header is read here, and
an integer tensor can be mapped as a numpy array. Pickles (`.pt`, `.bin`) need torch to be listed;
`pickles.py` reads those.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.tensor_info import DTYPE_BYTES, TensorInfo
from gptq_loader_plugin.errors import (
    CorruptCheckpoint,
    TensorMismatch,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = ["read_headers", "read_safetensors_header"]

# The format takes headers of 100 MB; the largest model published has 280,000 tensors.
HEADER_LIMIT = 40_000_000
TENSORS = 600_000
DIMENSIONS = 16
PAGE_MARKS = (b"<!doctype html", b"<html")
LFS_MARK = b"version https://git-lfs.github.com/spec/"


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
        if len(headers) > TENSORS:
            raise CorruptCheckpoint(
                f"with this file there are more than {TENSORS:,} tensors, which no model has",
                path=file,
                hint="keep the files of one checkpoint only in a folder",
            )
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
    if first.lstrip().lower().startswith(PAGE_MARKS):
        raise CorruptCheckpoint(
            f"this is a web page of {size:,} bytes, not weights: a hub answered with it",
            path=file,
            hint="download the file again, signed in if its repository is gated",
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
    except (ValueError, RecursionError) as error:  # not text, not JSON, numbers without end
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
        dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        start, end = (int(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
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
    if len(shape) > DIMENSIONS:
        raise CorruptCheckpoint(
            f"{name} has {len(shape):,} dimensions", path=file, tensor=name, hint=again
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
