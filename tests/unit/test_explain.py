"""What `explain` says: to the character for six branches on six devices, and readable for all."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from altered import ALL, DATA, ONE, copy, edit_tensors, golden

import gptq_loader_plugin as gptq
from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device, find_device
from gptq_loader_plugin.kernel import Declined
from gptq_loader_plugin.planning.choose import choose
from gptq_loader_plugin.planning.plan import make_plan

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import LayerSpec

BRANCHES = (
    "gptq-4bit-noneg-act-sym",
    "gptq-4bit-32g-act-sym",
    "gptq-4bit-64g-act-sym",
    "gptq-4bit-128g-act-sym",
    "gptq-3bit-noneg-act-sym",
    "gptq-3bit-128g-act-sym",
)
GPUS = ("cuda:sm75", "cuda:sm80", "cuda:sm86", "cuda:sm90", "rocm")
# A CPU that is the same wherever the tests run.
CPU = Device("cpu", features=frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16"}))
PAGE = Path(__file__).parents[2] / "docs" / "kernels" / "dispatch.md"
needs_library = pytest.mark.skipif(
    find_library() is None, reason="the native library was not built: no C++ compiler"
)


def installed() -> gptq.Plugins:
    return gptq.Plugins(installed=True, environ=ALL)


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_on_a_gpu_that_is_not_here(branch: str, device: str) -> None:
    plan = gptq.explain(DATA / branch, device=device, plugins=installed())
    golden(f"explain-{branch}-{device.replace(':', '-')}.txt", f"{plan.explain()}\n")


@needs_library
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_on_a_cpu(branch: str) -> None:
    path = DATA / branch
    plan = make_plan(open_checkpoint(path), CPU, installed().kernels(), reference=str(path))
    golden(f"explain-{branch}-cpu.txt", f"{plan.explain()}\n")


def test_a_float16_model_goes_to_exllama_first(tmp_path: Path) -> None:
    """As those of 2023 are; the tests' own are bfloat16 ones."""
    folder = copy(ONE, tmp_path)
    edit_tensors(
        folder,
        lambda it: {
            name: tensor.half() if tensor.dtype == torch.bfloat16 else tensor
            for name, tensor in it.items()
        },
    )
    for device in ("cuda:sm80", "cuda:sm86", "cuda:sm89", "cuda:sm90", "cuda:sm100", "cuda:sm120"):
        half = gptq.explain(folder, device=device, plugins=installed())
        assert half.kernels() == {"exllama": 14}
        assert half.not_built is not None
        assert half.not_built.kernels() == {"triton": 14}
        words = half.explain()
        assert "where ExLlamaV2's extension is not built:" in words
        assert "needs ExLlamaV2's compiled extension, taken here as not built" in words
        whole = gptq.explain(DATA / ONE, device=device, plugins=installed())
        assert (whole.kernels(), whole.dtype) == ({"triton": 14}, "bfloat16")
        named = gptq.explain(DATA / ONE, device=device, plugins=installed(), backend="exllama")
        assert (named.kernels(), named.dtype) == ({"exllama": 14}, "float16")
    for device in ("cuda:sm75", "rocm"):
        plan = gptq.explain(folder, device=device, plugins=installed())
        assert plan.kernels() == {"exllama": 14}
        assert plan.not_built is not None
        assert plan.not_built.kernels() == {"triton": 14}


def test_both_answers_are_in_the_json() -> None:
    data = gptq.explain(DATA / ONE, device="cuda:sm75", plugins=installed()).to_json()
    assert (data["kernels"], data["not_built"]["kernels"]) == ({"exllama": 14}, {"triton": 14})
    reasons = {it["kernel"]: it["reason"] for it in data["not_built"]["layers"][0]["declined"]}
    assert reasons["exllama"] == "needs ExLlamaV2's compiled extension, taken here as not built"
    note = data["not_built"]["layers"][0]["note"]
    assert re.fullmatch(
        r"weights stay packed; multiplied without tensor cores; from \d+ rows on dequantised", note
    )


def test_the_plan_counts_the_largest_layers_scratch_once() -> None:
    plan = gptq.explain(DATA / ONE, device="cuda:sm80", plugins=installed())
    dense = gptq.explain(DATA / ONE, device="cuda:sm80", plugins=installed(), backend="dense")
    assert (plan.dtype, dense.dtype) == ("bfloat16", "bfloat16")
    rest = dense.weight_bytes - sum(it.chosen.prepared_bytes for it in dense.choices)
    layers = sum(it.chosen.prepared_bytes for it in plan.choices)
    largest = max(2 * it.layer.in_features * it.layer.out_features for it in plan.choices)
    assert (plan.weight_bytes, plan.scratch_bytes) == (rest + layers, largest)


LAYERS = [
    *(
        Case(bits=bits, group_size=group, act_order=act)
        for bits, group, act in product((2, 3, 4, 8), (-1, 0, 16, 32, 64, 96, 128), (False, True))
    ),
    *(Case(bits=bits, layout="planar") for bits in (5, 6, 7)),
    *(Case(bits=bits, rows=576) for bits in (3, 4)),
    *(Case(bits=bits, rows=48, group_size=-1) for bits in (2, 4, 8)),
    *(Case(bits=bits, columns=columns) for bits in (3, 4) for columns in (8, 40, 100)),
    *(Case(sym=False, extreme_zeros=extreme) for extreme in (False, True)),
    *(Case(dtype=dtype) for dtype in ("bfloat16", "float32")),
]
FEATURES = ((), ("avx2",), ("avx2", "avx512f"), ("avx2", "avx512f", "avx512_bf16"), ("bf16",))
DEVICES = [
    *(
        Device("cuda", capability=capability, present=False, assume_built=built)
        for capability in ((5, 2), (6, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))
        for built in (True, False)
    ),
    *(Device("rocm", arch="gfx1100", present=False, assume_built=it) for it in (True, False)),
    Device("cuda", capability=(8, 6)),  # here, with what is installed
    Device("mps"),
    Device("xpu"),
    *(Device("cpu", features=frozenset(it)) for it in FEATURES),
]


def specs() -> list[LayerSpec]:
    found = [make_layer(case)[0] for case in LAYERS]
    found.append(replace(found[0], in_features=1 << 17, group_rows=(1 << 17, 1 << 17)))
    return [*found, *(replace(it, model_dtype="bfloat16") for it in found)]


def readable(words: str) -> bool:
    """Whether a person reads it at a glance, and without knowing the code."""
    return len(words) <= 100 and not re.search(r"_|`|\w\(|::|\bNone\b", words)


def names_why(words: str, layer: LayerSpec, device: Device) -> bool:
    """Whether a refusal names what it is about the layer, the device, or what is installed."""
    values = [layer.bits, layer.in_features, layer.out_features]
    values += [*layer.group_rows, *layer.zero_range]
    if any(re.search(rf"\b{value}\b", words) for value in values) and ";" in words:
        return True
    return words.endswith(f"; this is {device}") or any(
        it in words for it in ("; this CPU has", "install", "built")
    )


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("build", ["1", "0"])
def test_every_reason_is_for_people(
    native: str, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQ_LOADER_NATIVE", native)
    monkeypatch.setenv("GPTQ_LOADER_EXLLAMA_BUILD", build)
    kernels = gptq.Plugins(installed=True).kernels()
    for layer, device in product(specs(), DEVICES):
        choice = choose(layer, device, kernels)
        for name, words in choice.reasons():
            assert readable(words), f"{name}: {words}"
        for declined in choice.declined:
            assert names_why(declined.reason, layer, device), declined
    with pytest.raises(gptq.NoBackend) as caught:
        choose(make_layer(Case(bits=3))[0], DEVICES[0], kernels, only="exllama")
    assert all(readable(it.reason) for it in caught.value.declined)


def test_the_rule_for_reasons_can_fail() -> None:
    layer, device = make_layer(Case(bits=3))[0], DEVICES[0]
    good = "3-bit; ExLlama takes 4-bit only"
    assert readable(good)
    assert names_why(good, layer, device)
    for words in ("in_features is odd", "call pack() first", "a" * 101):
        assert not readable(words)
    assert not names_why("4-bit only", layer, device)
    assert isinstance(choose(layer, device, installed().kernels()).declined[0], Declined)


KINDS = {
    "4-bit, float16 model, no groups or groups of 32, 64 or 128": [
        Case(group_size=group, act_order=act)
        for group, act in product((-1, 32, 64, 128), (False, True))
    ],
    "4-bit, bfloat16 model, the same groups": [
        Case(group_size=group, act_order=act, dtype="bfloat16")
        for group, act in product((-1, 32, 64, 128), (False, True))
    ],
    "4-bit, groups of 16 or 96": [Case(group_size=16), Case(rows=192, group_size=96)],
    "4-bit, a last group shorter than the others": [Case(rows=576), Case(rows=160)],
    "4-bit, zeros of 0": [Case(sym=False, extreme_zeros=True)],
    "4-bit, outputs not a multiple of 32": [Case(columns=columns) for columns in (40, 100)],
    "2, 3 or 8-bit": [
        Case(bits=bits, group_size=group, act_order=act)
        for bits, group, act in product((2, 3, 8), (-1, 16, 32, 64, 96, 128), (False, True))
    ],
    "5, 6 or 7-bit": [Case(bits=bits, layout="planar") for bits in (5, 6, 7)],
    "2, 4 or 8-bit, inputs not a multiple of 32": [
        Case(bits=bits, rows=48, group_size=-1) for bits in (2, 4, 8)
    ],
    "2, 3, 4 or 8-bit, groups of uneven size": [
        Case(bits=bits, group_size=0) for bits in (2, 3, 4, 8)
    ],
}
ARCHITECTURES = ("sm60", "sm70", "sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120")


def table() -> str:
    """Ask every kernel about every kind of layer, and join the devices that answer alike."""
    kernels = installed().kernels()
    devices = [(it, find_device(f"cuda:{it}")) for it in ARCHITECTURES]
    devices += [("ROCm", find_device("rocm")), ("Apple", find_device("mps"))]
    devices += [("Intel", find_device("xpu")), ("CPU", CPU)]
    columns: dict[tuple[str, ...], list[str]] = {}
    for name, device in devices:
        answers = []
        for cases in KINDS.values():
            found = set()
            for case in cases:
                layer = make_layer(case)[0]
                chosen = [
                    choose(layer, replace(device, assume_built=built), kernels).chosen.kernel
                    for built in (True, False)
                ]
                found.add(" or ".join(f"`{it}`" for it in dict.fromkeys(chosen)))
            assert len(found) == 1, f"{cases} are no one kind: {found}"
            answers.append(found.pop())
        columns.setdefault(tuple(answers), []).append(name)
    heads = ["layer", *map(", ".join, columns.values())]
    rows = [heads, ["---"] * len(heads), *zip(KINDS, *columns, strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@needs_library
def test_the_page_on_dispatch_has_the_kernels_own_answers() -> None:
    start, end = "<!-- what the kernels answer -->\n", "<!-- end -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(start)
    written, _, after = rest.partition(end)
    found = f"\n{table()}\n"
    if os.environ.get("GPTQ_LOADER_GOLDEN") == "write":
        PAGE.write_text(f"{before}{start}{found}{end}{after}", encoding="utf-8")
        return
    assert written == found
