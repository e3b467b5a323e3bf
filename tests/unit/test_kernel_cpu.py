"""The native CPU kernel: every code path of the library, and what happens without it."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import io
import pickle
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import torch
from native_codes import CODES, EXACT_CODES, Code, runs

from gptq_loader_kernels.cpu import CpuInt8Kernel, CpuKernel, gptq_kernels
from gptq_loader_kernels.cpu import library as _native
from gptq_loader_kernels.cpu.int4 import Int4Kernel
from gptq_loader_kernels.cpu.library import Activations, Isa, find_library, load_library
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.kernel import Accepted, Declined, Device
from gptq_loader_plugin.planning.choose import choose
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_kernels.cpu.linear import NativeLinear

CPU = Device("cpu", features=frozenset({"avx2", "avx512f", "avx512_bf16"}))
native = pytest.mark.skipif(find_library() is None, reason="no C++ compiler built the library")
# Products are exact in both; float32's sums are rounded, and bfloat16's answers are.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 2e-3}
INT16_TOLERANCE = 5e-5  # x is off by 2**-16 of the greatest of its segment


def module(
    case: Case, code: Code | None = None, **how: bool
) -> tuple[NativeLinear, torch.Tensor, torch.Tensor]:
    """(the layer, its weight in float64 [N, K], its bias)."""
    from gptq_loader_kernels.cpu.linear import NativeLinear

    _, packed, weight = make_layer(case)
    isa, activations = code or (None, None)
    layer = NativeLinear(
        packed, in_features=case.rows, out_features=case.columns, isa=isa, activations=activations,
        **how,
    )  # fmt: skip
    bias = torch.zeros(case.columns) if packed.bias is None else packed.bias
    return layer, weight, bias.double()


def error(layer: NativeLinear, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> float:
    right = x.double() @ weight.t() + bias
    answer = layer(x)
    assert (answer.dtype, answer.shape) == (x.dtype, right.shape)
    return float((answer.double() - right).norm() / right.norm())


def use_panels_from(layer: NativeLinear, rows: int) -> None:
    """Have panels of the weight unpacked from so many rows, for what can be."""
    layer.panels_from = {dtype: it and rows for dtype, it in layer.panels_from.items()}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@native
@pytest.mark.parametrize("code", EXACT_CODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_every_code_path_is_right(code: Code, bits: int) -> None:
    layout = "planar" if bits == 5 else "continuous"
    columns = 192 if bits == 5 else 200  # of a planar file they come in blocks of 32
    for group_size in (-1, 16, 48, 128, 0):
        for scales in ("float16", "float32", "bfloat16"):
            case = Case(
                bits=bits, group_size=group_size, rows=384, columns=columns, dtype=scales,
                sym=group_size == 128, extreme_zeros=True, bias=True, layout=layout,
            )  # fmt: skip
            layer, weight, bias = module(case, code)
            for many_from in (1000, 5):
                layer.unpack_from = many_from
                use_panels_from(layer, many_from)
                for rows in (1, 2, 3, 4, 5, 70):
                    for dtype, limit in TOLERANCE.items():
                        if code[1] is Activations.INT16:
                            limit = max(limit, INT16_TOLERANCE)  # noqa: PLW2901
                        off = error(layer, weight, bias, random(rows, 384, dtype=dtype))
                        assert off < limit, (case, rows, many_from, dtype, off)


@native
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_row_is_the_same_whatever_rows_are_beside_it(code: Code, bits: int) -> None:
    for group_size in (32, 48, 128):
        case = Case(bits=bits, group_size=group_size, rows=384, columns=200, bias=True)
        layer, _, _ = module(case, code)
        for dtype in (torch.float32, torch.bfloat16):
            x = random(9, 384, dtype=dtype)
            alone = torch.cat([layer(row[None]) for row in x])
            for rows in range(2, 10):
                assert torch.equal(layer(x[:rows]), alone[:rows]), (group_size, dtype, rows)


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_panels_of_whole_numbers_are_right(bits: int) -> None:
    """Rows that end inside a block of six or a chunk of 96, columns that end inside a tile."""
    if not runs(Isa.AVX2):
        pytest.skip("this processor has no AVX2")
    code, threads = (Isa.AVX2, Activations.INT16), torch.get_num_threads()
    for group_size, features, columns in (
        (32, 256, 40), (-1, 160, 100), (16, 160, 64), (0, 320, 130), (128, 2080, 33), (-1, 608, 64),
    ):  # fmt: skip
        case = Case(
            bits=bits, group_size=group_size, rows=features, columns=columns, sym=False,
            extreme_zeros=True, bias=True,
        )  # fmt: skip
        layer, weight, bias = module(case, code)
        use_panels_from(layer, 1)
        for dtype, limit in ((torch.bfloat16, TOLERANCE[torch.bfloat16]),
                             (torch.float32, INT16_TOLERANCE)):  # fmt: skip
            x = random(200, features, dtype=dtype)
            whole = layer(x)
            for rows in (1, 5, 6, 7, 95, 96, 97, 192, 200):
                assert error(layer, weight, bias, x[:rows]) < limit, (features, rows)
                assert torch.equal(layer(x[:rows]), whole[:rows]), (features, rows)
            x[3] = float("nan")
            x[50, 7] = float("inf")
            x[97] *= 1e-36
            try:
                torch.set_num_threads(3)
                answer = layer(x)
            finally:
                torch.set_num_threads(threads)
            broken = answer.isnan().any(dim=1)
            assert broken.nonzero().flatten().tolist() == [3, 50]
            near = [row for row in range(200) if row not in (3, 50, 97)]
            assert torch.equal(answer[near], whole[near])
            assert error(layer, weight, bias, x[97:98]) < limit


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("amx", [False, True])
def test_panels_are_right(bits: int, amx: bool) -> None:
    """Rows and depths that end inside a block, a pair of blocks, a run and a part of x."""
    library = load_library()
    if library.gptq_isa() < Isa.AVX512_BF16 or (amx and not library.gptq_amx()):
        pytest.skip(f"this processor has no {'AMX' if amx else 'AVX512-BF16'}")
    for group_size, features, columns in (
        (32, 256, 40), (-1, 160, 100), (16, 160, 64), (0, 320, 130), (128, 2080, 33),
    ):  # fmt: skip
        layer, weight, bias = module(
            Case(
                bits=bits, group_size=group_size, rows=features, columns=columns, sym=False,
                extreme_zeros=True, bias=True,
            ), amx=amx,
        )  # fmt: skip
        use_panels_from(layer, 1)
        for rows in (1, 15, 16, 17, 32, 33, 65, 530):
            x = random(rows, features, dtype=torch.bfloat16)
            assert error(layer, weight, bias, x) < TOLERANCE[torch.bfloat16], (features, rows)
            alone = layer(x[-1:])  # by the code of another number of rows
            assert torch.allclose(layer(x)[-1:], alone, rtol=1e-2, atol=1e-2)


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_threads_that_share_rows_answer_as_one_does(bits: int, amx: bool, act_order: bool) -> None:
    library = load_library()
    if library.gptq_isa() < Isa.AVX512_BF16 or (amx and not library.gptq_amx()):
        pytest.skip(f"this processor has no {'AMX' if amx else 'AVX512-BF16'}")
    threads = torch.get_num_threads()
    for group_size, features in ((32, 256), (-1, 160), (16, 224)):
        case = Case(
            bits=bits, group_size=group_size, rows=features, columns=72, sym=False,
            act_order=act_order, bias=True,
        )  # fmt: skip
        layer, weight, bias = module(case, amx=amx)
        for rows in (256, 300, 1090):
            x = random(rows, features, dtype=torch.bfloat16)
            alone = layer(x)
            assert error(layer, weight, bias, x) < TOLERANCE[torch.bfloat16]
            try:
                for team in (2, 3):
                    torch.set_num_threads(team)
                    assert torch.equal(layer(x), alone), (group_size, rows, team)
            finally:
                torch.set_num_threads(threads)


@native
def test_layers_that_read_x_alike_are_multiplied_in_one_call() -> None:
    if load_library().gptq_isa() < Isa.AVX512_BF16:
        pytest.skip("this processor has no AVX512-BF16")
    # order of rows and groups are the first one's: queries, keys and values of one checkpoint
    made = [
        module(Case(group_size=64, columns=columns, act_order=False)) for columns in (96, 33, 64)
    ]
    x = random(70, 256, dtype=torch.bfloat16)
    answers = [torch.empty(70, layer.out_features, dtype=torch.bfloat16) for layer, _, _ in made]
    layers = (ctypes.c_void_p * 3)(*(ctypes.addressof(layer.filled()) for layer, _, _ in made))
    outs = (ctypes.c_void_p * 3)(*(it.data_ptr() for it in answers))
    library = load_library()
    failed = library.gptq_gemm(
        ctypes.addressof(layers), ctypes.addressof(outs), 3, x.data_ptr(), 70, 1,
        library.gptq_isa(), library.gptq_amx(), 2,
    )  # fmt: skip
    assert not failed
    for (layer, _, _), answer in zip(made, answers, strict=True):
        use_panels_from(layer, 1)
        assert torch.equal(answer, layer(x))


@native
def test_an_unpacked_weight_is_rounded_once() -> None:
    """What a panel holds is the dequantised weight in bfloat16, to the bit."""
    if load_library().gptq_isa() < Isa.AVX512_BF16:
        pytest.skip("this processor has no AVX512-BF16")
    from gptq_loader_kernels.cpu.linear import NativeLinear

    for bits in (2, 3, 4, 8):
        _, packed, _ = make_layer(Case(bits=bits, group_size=32, rows=96, columns=80, sym=False))
        layer = NativeLinear(packed, in_features=96, out_features=80)
        use_panels_from(layer, 1)
        one_at_a_time = layer(torch.eye(96, dtype=torch.bfloat16))
        assert torch.equal(one_at_a_time, packed.dequantize(torch.bfloat16).t())


@native
@pytest.mark.parametrize("greatest", [1e3, 1e30, 1e-30])
def test_a_feature_far_above_the_others_costs_them_nothing(greatest: float) -> None:
    """Models have such features; a row in whole numbers shares its step with them."""
    layer, weight, bias = module(Case(bits=4, group_size=64, rows=256, columns=200, bias=True))
    x = random(3, 256, dtype=torch.bfloat16)
    x[:, 7] = greatest
    assert error(layer, weight, bias, x) < TOLERANCE[torch.bfloat16]
    rest = x.clone()
    rest[:, 7] = 0
    others = layer(x).double() - x[:, 7:8].double() * weight[:, 7]
    if greatest == 1e3:  # what the others add is within y's own rounding
        off = (others - layer(rest).double()).norm() / layer(x).double().norm()
        assert off < TOLERANCE[torch.bfloat16]


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_activations_in_8_bits(bits: int) -> None:
    if "avx512_vnni" not in find_device("cpu").features:
        pytest.skip("this processor has no AVX512-VNNI")
    layout = "planar" if bits == 5 else "continuous"
    columns = 192 if bits == 5 else 200
    for group_size in (-1, 16, 48, 128, 0):
        case = Case(
            bits=bits, group_size=group_size, rows=384, columns=columns, sym=False, bias=True,
            extreme_zeros=True, layout=layout,
        )  # fmt: skip
        layer, weight, bias = module(case, (Isa.AVX512, Activations.INT8))
        for rows in (1, 2, 3, 4, 5, 70):
            for dtype in TOLERANCE:
                off = error(layer, weight, bias, random(rows, 384, dtype=dtype))
                assert off < 1.2e-2, (case, rows, dtype, off)
        assert layer(torch.empty(0, 384)).shape == (0, columns)
        x = torch.ones(3, 384, dtype=torch.bfloat16)
        x[0, 5], x[1, 7] = torch.nan, torch.inf
        answer = layer(x)
        assert not answer[:2].isfinite().any()
        assert answer[2].isfinite().all()


def test_int8_is_only_for_who_asks() -> None:
    spec, _, _ = make_layer(Case())
    vnni = {"avx512f", "avx512_vnni", "avx512_bf16"}
    here = Device("cpu", features=frozenset(vnni))
    for features in ({"avx2"}, {*vnni, "amx_bf16"}):
        device = Device("cpu", features=frozenset(features))
        assert isinstance(CpuInt8Kernel().consider(spec, device), Declined)
    if find_library() is None:
        return
    assert choose(spec, here, gptq_kernels()).chosen.kernel == "cpu"
    chosen = choose(spec, here, gptq_kernels(), only="cpu-int8")
    assert "8 bits" in chosen.chosen.note


@native
def test_a_weight_too_large_for_the_cache_is_unpacked_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, weight, bias = module(Case(columns=1000, bias=True))
    from gptq_loader_kernels.cpu import linear as _native_linear

    monkeypatch.setattr(_native_linear, "UNPACKED_BYTES", 1)
    layer.unpack_from = 1
    assert error(layer, weight, bias, random(9, 256)) < 2e-6


@native
def test_smallest_float16_scales_are_exact() -> None:
    from gptq_loader_kernels.cpu.linear import NativeLinear

    _, packed, _ = make_layer(Case(rows=128, columns=64, bits=4))
    scales = torch.arange(1, 65, dtype=torch.int16).view(torch.float16)[None]  # subnormal
    packed = dataclasses.replace(packed, scales=scales)
    for isa in range(load_library().gptq_isa() + 1):
        code: Any = {"isa": Isa(isa), "activations": Activations.FLOAT32}
        layer = NativeLinear(packed, in_features=128, out_features=64, **code)
        x = torch.ones(1, 128)
        right = x @ packed.dequantize().t()
        assert torch.equal(layer(x), right)


@native
def test_inputs_of_any_shape() -> None:
    layer, weight, bias = module(Case())
    assert layer(torch.empty(0, 256)).shape == (0, 96)
    assert layer(torch.empty(2, 0, 256)).shape == (2, 0, 96)
    assert error(layer, weight, bias, random(256)) < 2e-6
    assert error(layer, weight, bias, random(2, 3, 256)) < 2e-6
    assert error(layer, weight, bias, random(256, 7).t()) < 2e-6
    assert error(layer, weight, bias, random(5, 512)[:, ::2]) < 2e-6


@native
def test_threads_do_not_change_the_answer() -> None:
    layer, _, _ = module(Case(columns=1000, rows=512))
    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 9, 130):
            answers = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                answers.append(layer(random(rows, 512, dtype=dtype)))
            torch.set_num_threads(before)
            assert all(torch.equal(it, answers[0]) for it in answers)


@native
def test_infinities_and_nans_are_passed_on() -> None:
    layer, _, _ = module(Case())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(3, 256, dtype=dtype)
        x[0, 5], x[1, 7] = torch.nan, torch.inf
        answer = layer(x)
        assert answer[0].isnan().all()
        assert not answer[1].isfinite().any()
        assert answer[2].isfinite().all()


@native
def test_copies_and_casts_keep_the_numbers() -> None:
    layer, _, _ = module(Case(bias=True))
    x = random(2, 256)
    right = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), right)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), right)
    kept = io.BytesIO()
    torch.save(layer, kept)
    kept.seek(0)
    assert torch.equal(torch.load(kept, weights_only=False)(x), right)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(layer.to(dtype)(x), right)
    assert "256, 96, 4-bit" in repr(layer)
    with pytest.raises(RuntimeError, match="meta"):
        layer.to("meta")(x)


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_bytes_it_says_are_the_bytes_it_takes(bits: int) -> None:
    layout = "planar" if bits == 6 else "continuous"
    spec, packed, _ = make_layer(Case(bits=bits, group_size=32, layout=layout))
    verdict = CpuKernel().consider(spec, CPU)
    assert isinstance(verdict, Accepted)
    layer = CpuKernel().prepare(spec, packed, CPU)
    held = {name: it.nbytes for name, it in layer.named_buffers() if "segment" not in name}
    assert sum(held.values()) == verdict.prepared_bytes


def test_it_says_what_it_computes_in() -> None:
    spec, _, _ = make_layer(Case())
    found = {
        features: CpuKernel().consider(spec, Device("cpu", features=frozenset(features)))
        for features in (
            ("avx2", "avx512f", "avx512_bf16"),
            ("avx2", "avx512f"),
            ("avx2", "avx_vnni"),
            ("avx2",),
            (),
        )
    }
    if find_library() is None:
        assert all(isinstance(it, Declined) for it in found.values())
        return
    said = [(it.dtype, it.note) for it in found.values() if isinstance(it, Accepted)]
    assert [dtype for dtype, _ in said] == ["bfloat16", *["float32"] * 4]
    assert [word in note for word, (_, note) in zip(
        ("AVX512-BF16", "AVX-512", "AVX-VNNI", "AVX2", "any processor"), said, strict=True
    )] == [True] * 5  # fmt: skip


def test_a_library_that_cannot_be_loaded_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "_gptq_cpu.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(_native, "find_library", lambda: broken)
    load_library.cache_clear()
    spec, _, _ = make_layer(Case())
    choice = choose(spec, CPU, Plugins(installed=True).kernels())
    assert choice.chosen.kernel == "cpu-int4"
    assert "cannot be loaded" in dict(choice.reasons())["cpu"]
    load_library.cache_clear()


SIZES = {name: ctypes.sizeof(structure) for name, structure in _native.STRUCTURES.items()}


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    ("sizes", "letters", "words"),
    [
        (None, None, "it has no gptq_sizeof"),
        (SIZES, None, "it has no gptq_signature"),
        ({}, {}, f"its GptqLinear has 0 bytes, and {SIZES['GptqLinear']} here"),
        (SIZES | {"GptqModel": 8}, {}, "its GptqModel has 8 bytes"),
        (SIZES, {}, "its gptq_isa takes other arguments"),
        (SIZES, {**_native.FUNCTIONS, "gptq_pack": "ip"}, "its gptq_pack takes other arguments"),
        (SIZES, _native.FUNCTIONS, "it has no gptq_isa"),
    ],
)
def test_a_library_of_other_sources_is_refused(
    sizes: dict[str, int] | None,
    letters: dict[str, str] | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """An old build beside new Python would be called with what it does not expect."""
    lines = ["#include <string.h>"]
    for kind, name, table in (
        ("long", "gptq_sizeof", sizes),
        ("const char*", "gptq_signature", letters and {k: f'"{v}"' for k, v in letters.items()}),
    ):
        if table is not None:
            tests = "".join(f'if (!strcmp(name, "{k}")) return {v};' for k, v in table.items())
            lines.append(f"{kind} {name}(const char* name) {{ {tests} return 0; }}")
    other = tmp_path / "_gptq_cpu.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-o", other, "-"],
        input="\n".join(lines), text=True, check=True,
    )  # fmt: skip
    monkeypatch.setattr(_native, "find_library", lambda: other)
    load_library.cache_clear()
    try:
        spec, _, _ = make_layer(Case())
        reason = dict(choose(spec, CPU, [CpuKernel(), Int4Kernel()]).reasons())["cpu"]
    finally:
        load_library.cache_clear()
    assert words in reason
    assert "was built from other sources" in reason
    assert reason.endswith("install this again")


def test_without_the_library_torchs_operator_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_LOADER_NATIVE", "0")
    load_library.cache_clear()
    spec, _, _ = make_layer(Case())
    choice = choose(spec, CPU, Plugins(installed=True).kernels())
    assert choice.chosen.kernel == "cpu-int4"
    assert "C++ compiler" in dict(choice.reasons())["cpu"]
    with pytest.raises(OSError, match="not built"):
        _native.load_library()


@pytest.mark.parametrize(
    ("machine", "system", "isa", "unpacks"),
    [
        ("aarch64", "linux", Isa.I8MM, False),
        ("aarch64", "linux", Isa.DOTPROD, True),
        ("arm64", "darwin", Isa.I8MM, True),
        ("x86_64", "linux", Isa.AVX_VNNI, True),
        ("x86_64", "linux", Isa.AVX512_BF16, True),
    ],
)
def test_a_weight_is_unpacked_where_that_pays(
    monkeypatch: pytest.MonkeyPatch, machine: str, system: str, isa: Isa, *, unpacks: bool
) -> None:
    from gptq_loader_kernels.cpu import linear

    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(linear.sys, "platform", system)
    assert (linear._unpack_from(isa) <= 192) == unpacks
