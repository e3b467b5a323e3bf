"""Torch files made to take the machine with them: each is one error, and little is read of it."""

from __future__ import annotations

import pickle
import random
import sys
import zipfile
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import torch
from processes import run_process

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.pickles import read_pickle_headers

if TYPE_CHECKING:
    from pathlib import Path

EMPTY = pickle.dumps({}, protocol=2)
MANY = 300_000
# Opens files where 600 MB of addresses are left, and says what came of each.
OPEN = """
import resource, sys
from pathlib import Path
import psutil, torch
import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.pickles import read_pickle_headers
most = psutil.Process().memory_info().vms + 600_000_000
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for name in sys.argv[1:]:
    try:
        print(len(read_pickle_headers(Path(name))), "tensors", flush=True)
    except gptq.CheckpointError as error:
        print(type(error).__name__, flush=True)
"""


def archive(file: Path, table: bytes, *, compress: int = zipfile.ZIP_STORED) -> Path:
    """Write a torch file by hand."""
    with zipfile.ZipFile(file, "w", compress) as made:
        made.writestr("archive/data.pkl", table)
        made.writestr("archive/version", "3\n")
        made.writestr("archive/byteorder", "little")
    return file


def nested_key(depth: int) -> bytes:
    """Pickle a table whose key is a tuple in a tuple, so many deep."""
    return b"\x80\x02})" + b"\x85" * depth + b"K\x01s."


BOMBS = {
    "a key that overflows the stack": nested_key(MANY),
    "a key of tuples kept and doubled": b"\x80\x02})" + b"q\x00h\x00\x86" * 100_000 + b"K\x01s.",
    "lists in lists": b"\x80\x02" + b"]" * MANY + b"a" * (MANY - 1) + b".",
    "a bytearray of a terabyte": b"\x80\x02}U\x01acbuiltins\nbytearray\n"
    b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85Rs.",
    "a mark for ever": b"\x80\x02" + b"(" * MANY + b".",
    "a memo of many": b"\x80\x02]" + b"".join(
        b"]r" + number.to_bytes(4, "little") + b"a" for number in range(100_000)
    ) + b".",
    "a table in itself": b"\x80\x02}q\x00U\x05modelh\x00s.",
}  # fmt: skip


def test_a_pickle_made_to_do_harm_is_an_error(tmp_path: Path) -> None:
    files = [archive(tmp_path / f"{i}.pt", bomb) for i, bomb in enumerate(BOMBS.values())]
    completed = run_process([sys.executable, "-c", OPEN, *files])
    said = dict(zip(BOMBS, completed.stdout.splitlines(), strict=False))
    assert completed.returncode == 0, (said, completed.stderr)
    allowed = {"CorruptCheckpoint", "UnsafeFile", "0 tensors"}
    assert len(said) == len(BOMBS)
    assert set(said.values()) <= allowed, said


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    huge = b"\x80\x02" + b"N0" * 20 * MANY + b"}."
    file = archive(tmp_path / "model.pt", huge, compress=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < MANY
    with pytest.raises(gptq.CorruptCheckpoint, match="an entry that is compressed"):
        read_pickle_headers(file)


def test_an_archive_of_too_many_entries_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_loader_plugin.checkpoint.pickle_limits.MAX_ENTRIES", 3)
    file = archive(tmp_path / "model.pt", EMPTY)
    assert read_pickle_headers(file) == []
    with zipfile.ZipFile(file, "a") as more:
        more.writestr("archive/data/0", b"")
    with pytest.raises(gptq.CorruptCheckpoint, match="4 entries"):
        read_pickle_headers(file)


def test_tensors_that_are_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    for tensor in (torch.zeros(1).expand(1 << 40), torch.empty(1 << 40, device="meta")):
        torch.save({"a": tensor}, file)
        with pytest.raises(gptq.CorruptCheckpoint, match="whose numbers are not in the file"):
            read_pickle_headers(file)


@pytest.mark.parametrize("legacy", [False, True])
def test_ordinary_files_are_read_and_damaged_ones_are_one_error(
    legacy: bool, tmp_path: Path
) -> None:
    tensors = {f"layers.{i}.weight": torch.arange(i + 1) for i in range(6)}
    file = tmp_path / "model.pt"
    torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=not legacy)
    whole = file.read_bytes()
    assert {it.name: it.shape for it in read_pickle_headers(file)} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    draw = random.Random(3)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 3, 20))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(damaged)
        with suppress(gptq.CheckpointError):
            read_pickle_headers(file)
