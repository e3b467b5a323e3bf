"""Tensors are read once, mapped where large, let go of after use, and read ahead in order."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint import read_ahead
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.read_ahead import ReadAhead
from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
from gptq_loader_plugin.checkpoint.tensors import MAPPED_FROM, TensorFiles, is_finite

DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float16",
    "bfloat16",
    "float32",
    "float64",
]


def file_of(tmp_path: Path, **tensors: torch.Tensor) -> TensorFiles:
    save_file(tensors, tmp_path / "model.safetensors")
    return TensorFiles(read_headers([tmp_path / "model.safetensors"]))


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_as_it_is_written(tmp_path: Path, name: str) -> None:
    bits = torch.randint(0, 2 if name == "bool" else 100, (3, 5), dtype=torch.uint8)
    tensor = bits.to(getattr(torch, name))
    files = file_of(tmp_path, x=tensor, none=tensor[:0])
    assert files.tensor("x").dtype == tensor.dtype
    assert torch.equal(files.tensor("x").view(torch.uint8), tensor.view(torch.uint8))
    assert files.tensor("none").shape == (0, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_large_tensor_is_mapped_until_nothing_refers_to_it(tmp_path: Path) -> None:
    large = torch.arange(MAPPED_FROM // 4 + 3, dtype=torch.int32)
    files = file_of(tmp_path, large=large, small=large[:9].clone())
    small, numbers = files.tensor("small"), files.integers("large")
    assert small.tolist() == list(range(9))
    assert numbers[-1] == len(large) - 1
    assert not mapped(tmp_path)
    read = files.tensor("large")
    part = read[-3:]
    assert mapped(tmp_path)
    read[0] = 7  # a copy is written, not the file
    assert files.tensor("large")[0] == 0
    del read
    gc.collect()
    assert part.tolist() == large[-3:].tolist()
    del part
    gc.collect()
    assert not mapped(tmp_path)


def test_bytes_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    large = torch.arange(MAPPED_FROM, dtype=torch.int32)
    file = tmp_path / "odd.bin"
    file.write_bytes(b"x" + large.numpy().tobytes())
    info = TensorInfo("odd", "I32", (len(large),), file, 1)
    assert torch.equal(TensorFiles({"odd": info}).tensor("odd"), large)


@pytest.mark.parametrize("size", [8, MAPPED_FROM])
def test_a_file_cut_short_since_it_was_opened_is_said(tmp_path: Path, size: int) -> None:
    files = file_of(tmp_path, x=torch.zeros(size, dtype=torch.int32))
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(gptq.CorruptCheckpoint, match="x cannot be read"):
        files.tensor("x")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(gptq.CorruptCheckpoint, match="x cannot be read"):
        files.tensor("x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_found(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.randn(1001).to(dtype)
    assert is_finite(tensor)
    for at in (0, 500, 1000):
        one = tensor.clone()
        one[at] = bad
        assert not is_finite(one)
    assert is_finite(tensor[:0])


def test_reading_ahead_keeps_its_distance_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    changed = threading.Semaphore(0)

    def advise(tensor: TensorInfo, first: int, count: int) -> None:
        asked.append((tensor.name, first))
        assert count <= 10
        changed.release()

    monkeypatch.setattr(read_ahead, "_advise", advise)
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 10)
    tensors = [TensorInfo(name, "U8", (20,), tmp_path, 0) for name in "abc"]
    with ReadAhead(tensors, ahead=30) as ahead:
        for _ in range(3):
            assert changed.acquire(timeout=10)
        assert asked == [("a", 0), ("a", 10), ("b", 0)]
        ahead.used(20)
        for _ in range(2):
            assert changed.acquire(timeout=10)
    assert asked[3:] == [("b", 10), ("c", 0)]


def test_reading_ahead_of_files_that_are_not_there_is_no_error(tmp_path: Path) -> None:
    tensors = [TensorInfo("x", "U8", (20,), tmp_path / "absent", 0)]
    with ReadAhead(tensors) as ahead:
        ahead.used(20)
