"""Memory in large pages, and torch's own where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from gptq_loader_plugin.system import large_pages

if TYPE_CHECKING:
    import mmap


@pytest.mark.parametrize("count", [1, 3 << 20])
def test_a_tensor_is_its_own(count: int) -> None:
    first, second = (large_pages.empty((2, count), torch.int16) for _ in range(2))
    first.fill_(5)
    second.fill_(7)
    assert first.shape == (2, count)
    assert bool((first == 5).all())
    assert bool((second == 7).all())


@pytest.mark.skipif(not large_pages.HAS_LARGE_PAGES, reason="Linux alone has them")
def test_what_cannot_be_mapped_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(_file: int, size: int, **_: object) -> mmap.mmap:
        asked.append(size)
        raise OSError

    monkeypatch.setattr(large_pages.mmap, "mmap", refuse)
    tensor = large_pages.empty((4 << 20,), torch.int8)
    assert asked == [4 << 20]
    assert tensor.fill_(1).sum() == 4 << 20
