"""Packed weights lie side by side in large pages, and their memory goes with them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from gptq_loader_kernels.cpu import CpuKernel, memory
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.system import large_pages

mapped = pytest.mark.skipif(not large_pages.HAS_LARGE_PAGES, reason="no large pages here")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with no mapping."""
    monkeypatch.setattr(memory, "_mappings", memory._Mappings())


@mapped
def test_tensors_lie_side_by_side() -> None:
    first = memory.empty(3, 5, dtype=torch.int32)
    second = memory.empty(7, dtype=torch.uint8)
    assert second.data_ptr() - first.data_ptr() == memory.ALIGNMENT
    first.fill_(1)
    second.fill_(2)
    assert first.eq(1).all()
    assert second.eq(2).all()


@mapped
def test_a_tensor_larger_than_a_mapping_has_its_own() -> None:
    small = memory.empty(4, dtype=torch.uint8)
    large = memory.empty(memory.MAPPED_BYTES + 1, dtype=torch.uint8)
    large[-1] = 3
    after = memory.empty(4, dtype=torch.uint8)
    apart = abs(after.data_ptr() - small.data_ptr())
    assert apart >= memory.MAPPED_BYTES  # it did not fit behind the large one either
    assert large[-1] == 3


@mapped
def test_memory_goes_with_the_last_tensor() -> None:
    one, two = (memory.empty(4, dtype=torch.uint8) for _ in range(2))
    mapping = memory._mappings._last
    assert isinstance(mapping, weakref.ref)
    del one
    gc.collect()
    assert mapping() is not None
    del two
    gc.collect()
    assert mapping() is None
    assert memory.empty(4, dtype=torch.uint8).zero_().sum() == 0


def test_nothing_to_hold_takes_no_memory() -> None:
    assert memory.empty(0, 5, dtype=torch.int32).shape == (0, 5)
    assert memory._mappings._last is None


def test_placed_is_a_copy() -> None:
    tensor = torch.arange(6, dtype=torch.int32).view(2, 3)
    placed = memory.place(tensor)
    tensor.zero_()
    assert placed.tolist() == [[0, 1, 2], [3, 4, 5]]


@mapped
def test_without_a_mapping_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "map_memory", lambda _: None)
    assert memory.empty(2, 5, dtype=torch.int32).shape == (2, 5)
    assert memory._mappings._last is None


def test_without_large_pages_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "HAS_LARGE_PAGES", False)
    assert memory.empty(2, 2, dtype=torch.int32).shape == (2, 2)
    assert memory._mappings._last is None


@pytest.mark.parametrize("way", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_of_a_layer_takes_what_the_layer_takes(way: object) -> None:
    assert callable(way)
    case = Case(bits=4, group_size=32, rows=64, columns=64, act_order=False)
    layer, packed, _ = make_layer(case)
    module = CpuKernel().prepare(layer, packed, find_device("cpu"))
    copied = way(module)
    x = torch.randn(2, 64)
    del packed
    assert torch.equal(copied(x), module(x))
    for name, tensor in copied.named_buffers():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@mapped
def test_a_layer_takes_its_memory_once() -> None:
    case = Case(bits=4, group_size=128, rows=1024, columns=1024, act_order=False)
    layer, packed, _ = make_layer(case)
    module = CpuKernel().prepare(layer, packed, find_device("cpu"))
    bytes_ = sum(it.nbytes for it in module.buffers())
    assert bytes_ <= memory._mappings._filled < 1.01 * bytes_
