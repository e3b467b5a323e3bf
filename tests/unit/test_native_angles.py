"""Angles that were computed ahead are those that a decoder's own module computes for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_native_step import build, install

from gptq_loader_kernels.cpu.angles import AHEAD, Angles
from gptq_loader_kernels.cpu.library import find_library

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_kernels.cpu.describe import Described

pytestmark = pytest.mark.skipif(find_library() is None, reason="the native library was not built")

CALLS = [
    *([at] for at in range(AHEAD + 3)),
    [3], [AHEAD - 1, AHEAD], [AHEAD + 1], [5, 6, 7],
    # of several sequences, one of which ends where a single one would
    [10, 3, 12], [4, 4], [7, 9],
    [*range(AHEAD + 9)], [20_000],
]  # fmt: skip


def described(family: str) -> tuple[Any, Described]:
    model = build(family)
    step = install(model)
    built = step._build(torch.float32)
    assert built is not None
    return step, built


def assert_alone(
    found: tuple[torch.Tensor, torch.Tensor], step: Any, call: Sequence[int], built: Described
) -> None:
    for table, each in zip(found, zip(*map(alone(step, built), call), strict=True), strict=True):
        assert torch.equal(table, torch.cat(each, dim=1)), call


def alone(step: Any, built: Described) -> Any:
    angles = angles_of(step)
    return lambda at: angles._compute(step.decoder.rotary_emb, [at], built)


def angles_of(step: Any) -> Angles:
    return Angles(repeated=step.family.angles_repeated, once=step.family.angles_once)


@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere", "phi", "gpt_oss"])
def test_they_are_those_of_each_token(family: str) -> None:
    step, built = described(family)
    angles = angles_of(step)
    with torch.inference_mode():
        for call in CALLS:
            assert_alone(angles.of(step.decoder.rotary_emb, call, built), step, call, built)


def test_the_module_is_called_once_for_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    step, built = described("llama")
    rotary, angles = step.decoder.rotary_emb, Angles(repeated=False)
    calls: list[torch.Tensor] = []
    forward = type(rotary).forward

    def counted(self: Any, x: torch.Tensor, positions: torch.Tensor) -> Any:
        calls.append(positions)
        return forward(self, x, positions)

    monkeypatch.setattr(type(rotary), "forward", counted)
    for at in range(AHEAD):
        angles.of(rotary, [at], built)
    assert len(calls) == 1


def test_whoever_watches_the_module_sees_each_call() -> None:
    step, built = described("llama")
    rotary, angles = step.decoder.rotary_emb, Angles(repeated=False)
    seen: list[Any] = []
    rotary.register_forward_hook(lambda *call: seen.append(call))
    for at in range(3):
        angles.of(rotary, [at], built)
    assert len(seen) == 3
