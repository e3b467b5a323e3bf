"""ExLlama answers truthfully about every layer and GPU, and hands over what its sources say."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from gptq_loader_kernels.exllama import ExllamaKernel
from gptq_loader_plugin.checkpoint.packing import unpack_columns
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device
from gptq_loader_plugin.kernel import Accepted, Declined

BUILT = Device("cuda", capability=(8, 6), present=False, assume_built=True)
CASES = [
    (Case(), BUILT, None),
    (Case(group_size=-1), BUILT, None),
    (Case(group_size=32, sym=False), BUILT, None),
    (Case(columns=100), BUILT, None),  # padded
    (Case(), Device("rocm", arch="gfx1100", present=False, assume_built=True), None),
    (Case(), Device("cuda", capability=(7, 5), present=False, assume_built=True), None),
    (Case(), Device("cuda", capability=(5, 2), present=False, assume_built=True), "needs sm60"),
    (Case(), Device("cpu"), "needs a CUDA or ROCm GPU; this is cpu"),
    (Case(bits=3), BUILT, "4-bit only; this layer is 3-bit"),
    (Case(bits=8), BUILT, "4-bit only; this layer is 8-bit"),
    (Case(rows=192, group_size=96), BUILT, "power-of-two group size from 32 up; groups of 96"),
    (Case(group_size=16), BUILT, "groups of 16 would be wrong"),
    (Case(group_size=0), BUILT, "groups of equal size"),
    (Case(rows=576), BUILT, "groups of equal size; this layer's have 64 to 128 rows"),
    (Case(sym=False, extreme_zeros=True), BUILT, "zeros of 0 cannot be represented"),
    (Case(rows=40, group_size=-1), BUILT, "in_features 40 is not a multiple of 32"),
    (Case(), Device("cuda", capability=(8, 6), assume_built=False), "is not installed"),
]


@pytest.mark.parametrize(("case", "device", "words"), CASES, ids=lambda it: str(it)[:48])
def test_it_answers_truthfully(case: Case, device: Device, words: str | None) -> None:
    verdict = ExllamaKernel().consider(make_layer(case)[0], device)
    if words is None:
        assert isinstance(verdict, Accepted)
        assert verdict.dtype == "float16"
    else:
        assert isinstance(verdict, Declined)
        assert words in verdict.reason


def test_asking_never_imports_exllamav2() -> None:
    present = Device("cuda", capability=(8, 6))
    assert isinstance(ExllamaKernel().consider(make_layer(Case())[0], present), Declined)
    assert "exllamav2" not in sys.modules
    assert "exllamav2_ext" not in sys.modules


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in for the compiled extension, which needs a GPU: record what it is handed."""
    seen: dict[str, Any] = {"freed": []}
    names = ("q_weight", "q_perm", "q_invperm", "q_scale", "q_scale_max", "q_groups", "q_group_map",
             "qzeros", "scales", "g_idx", "bias", "temp_dq", "max_dq_rows")  # fmt: skip

    def make_q_matrix(*arguments: Any) -> int:
        seen.update(zip(names, arguments, strict=True))
        return 7

    module: Any = types.ModuleType("exllamav2_ext")
    module.make_q_matrix = make_q_matrix
    module.gemm_half_q_half = lambda x, handle, y, force: y.add_(handle)
    module.free_q_matrix = seen["freed"].append
    monkeypatch.setitem(sys.modules, "exllamav2_ext", module)
    return seen


def test_it_hands_over_what_the_sources_say(extension: dict[str, Any]) -> None:
    spec, packed, _ = make_layer(Case(columns=100, sym=False))
    before = packed.qweight.clone()
    module = ExllamaKernel().prepare(spec, packed, Device("cpu"))
    assert extension["q_weight"].shape == (32, 128)
    assert extension["q_weight"].dtype == torch.int32
    assert extension["q_perm"].dtype == extension["q_invperm"].dtype == torch.short
    assert extension["g_idx"].device.type == "cpu"
    assert extension["scales"].dtype == torch.half
    assert extension["q_groups"].is_meta
    assert extension["max_dq_rows"] >= spec.in_features
    stored = unpack_columns(extension["qzeros"].numpy(), 4, "continuous", 100)
    assert (stored + 1 == packed.zeros.numpy()).all()
    extension["q_weight"].zero_()
    assert torch.equal(packed.qweight, before)  # the extension rewrites its own copy
    assert module(torch.zeros(2, 3, 256)).shape == (2, 3, 100)
    del module
    assert extension["freed"] == [7]


def test_rows_in_order_are_not_permuted(extension: dict[str, Any]) -> None:
    spec, packed, _ = make_layer(Case(act_order=False))
    ExllamaKernel().prepare(spec, packed, Device("cpu"))
    assert extension["q_perm"].is_meta
    assert extension["g_idx"].is_meta
