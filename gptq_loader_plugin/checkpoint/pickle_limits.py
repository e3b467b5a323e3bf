"""Refuse a torch file that would take memory, time or the process with it, before it is unpickled.

torch's weights-only unpickler runs no code, and believes the file otherwise: an entry that unpacks
to a thousand times its size, a `bytearray` of a terabyte, a tuple in a tuple a million times, whose
hash overflows the stack and ends the process.
"""

from __future__ import annotations

import pickletools
import zipfile
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import IO

__all__ = ["check_pickle"]

MAX_ENTRIES = 500_000  # of an archive; one for each tensor
MAX_BYTES = 100_000_000  # of the table of tensors, as of the header of a safetensors file
MAX_OPERATIONS = 1_000_000  # of the table; some 50 for a tensor, and torch's unpickler is Python
MAX_DEPTH = 100  # containers in containers; a checkpoint's tensors lie about five deep
ALLOCATES = ("builtins bytearray", "__builtin__ bytearray")  # as much as its argument says
LEGACY_PICKLES = 5  # at the head of a file from before torch 1.6


def check_pickle(file: Path) -> None:
    """Look at a torch file's table of tensors without unpickling it.

    Raises:
        CorruptCheckpoint: it would take more than any checkpoint does.
        OSError: it cannot be read.
    """
    try:
        for stream in _pickles(file):
            _check_operations(stream, file)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, LookupError):
        return  # whatever is wrong with it, torch will say


def _pickles(file: Path) -> Iterator[IO[bytes]]:
    """Open each pickle of a file: of an archive the one, of an older file those at its head."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            for _ in range(LEGACY_PICKLES):
                yield stream
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES:
            raise _refused(file, f"{len(entries):,} entries")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
                raise _refused(file, f"an entry that is compressed, {entry.filename[:60]}")
        for entry in entries:
            if entry.filename.endswith("/data.pkl"):
                if entry.file_size > MAX_BYTES:
                    raise _refused(file, f"a table of tensors of {entry.file_size:,} bytes")
                with archive.open(entry) as stream:
                    yield stream


def _check_operations(stream: IO[bytes], file: Path) -> None:
    """Follow a pickle's operations with nothing but the depth of what they would make."""
    stack: list[int | None] = []  # depths; None is a mark
    kept: dict[Any, int] = {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        name = operation.name
        if count > MAX_OPERATIONS:
            raise _refused(
                file, f"a table of tensors that takes more than {MAX_OPERATIONS:,} operations"
            )
        if argument == "bytearray" or (name == "GLOBAL" and argument in ALLOCATES):
            raise _refused(file, "a bytearray, and no tensor")
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(kept.get(argument, 0))
            continue
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            kept[len(kept) if name == "MEMOIZE" else argument] = (stack[-1] if stack else 0) or 0
            continue
        depth = _pop(stack, operation)
        for made in operation.stack_after:
            is_mark = made is pickletools.markobject
            stack.append(None if is_mark else depth)
        if depth > MAX_DEPTH:
            raise _refused(file, f"containers in containers, more than {MAX_DEPTH} deep")


def _pop(stack: list[int | None], operation: pickletools.OpcodeInfo) -> int:
    """Take from the stack what an operation does; return the depth of what it makes of that."""
    taken: list[int | None] = []
    if pickletools.markobject in operation.stack_before:
        while stack and (top := stack.pop()) is not None:
            taken.append(top)
        before = operation.stack_before.index(pickletools.markobject)
    else:
        before = len(operation.stack_before)
    taken += [stack.pop() for _ in range(min(before, len(stack)))]
    depths = [depth for depth in taken if depth is not None]
    return 1 + max(depths) if depths else 0


def _refused(file: Path, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"it has {what}, as no checkpoint has; it was not read",
        path=file,
        hint="use a .safetensors version of this checkpoint",
    )
