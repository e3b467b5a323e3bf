"""ExLlama answers truthfully about every layer and GPU, and its products are right.

The extension needs a GPU. Here its double (exllama_double.py) is driven instead: what it is handed,
what it does in place, which path a prompt takes and how its float16 sums round are as in its
sources. Whether the double is true, only a GPU can tell: the last test says so where there is one.
"""

from __future__ import annotations

import copy
import gc
import logging
import sys
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import exllama_double
import pytest
import torch
from altered import DATA, ONE, expected
from exllama_double import Crash, Double

import gptq_loader_plugin as gptq
from gptq_loader_kernels.exllama import ExllamaKernel
from gptq_loader_kernels.exllama.extension import BUILD
from gptq_loader_kernels.exllama.linear import ExllamaLinear, Scratch
from gptq_loader_kernels.exllama.shape import dequantised_rows
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device, find_device
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Declined

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUILT = Device("cuda", capability=(8, 6), present=False, assume_built=True)
HERE = Device("cuda", capability=(8, 6))
CPU = Device("cpu")
CASES = [
    (Case(), BUILT, None),
    (Case(group_size=-1), BUILT, None),
    (Case(rows=96, group_size=-1), BUILT, None),  # one group of any length
    (Case(group_size=32, sym=False), BUILT, None),
    (Case(columns=100), BUILT, None),  # padded
    (Case(), Device("rocm", arch="gfx1100", present=False, assume_built=True), None),
    (Case(), Device("cuda", capability=(7, 5), present=False, assume_built=True), None),
    (Case(), Device("cuda", capability=(6, 0), present=False, assume_built=True), None),
    (
        Case(),
        Device("cuda", capability=(5, 2), present=False, assume_built=True),
        "needs sm60 or newer; this is cuda sm52",
    ),
    (Case(), CPU, "needs a CUDA or ROCm GPU; this is cpu"),
    (Case(bits=2), BUILT, "2-bit; ExLlama takes 4-bit only"),
    (Case(bits=3), BUILT, "3-bit; ExLlama takes 4-bit only"),
    (Case(bits=8), BUILT, "8-bit; ExLlama takes 4-bit only"),
    (Case(rows=192, group_size=96), BUILT, "groups of 96; ExLlama takes powers of two from 32 up"),
    (Case(group_size=16), BUILT, "groups of 16; ExLlama takes powers of two from 32 up"),
    (Case(group_size=0), BUILT, "groups of 28 to 40 rows; ExLlama takes groups of one size"),
    (Case(rows=576), BUILT, "groups of 64 to 128 rows; ExLlama takes groups of one size"),
    (
        Case(sym=False, extreme_zeros=True),
        BUILT,
        "zeros from 0 to 15; ExLlama takes 1 to 15",
    ),
    (Case(rows=40, group_size=-1), BUILT, "40 inputs; ExLlama takes multiples of 32"),
    (Case(), replace(BUILT, assume_built=False), "extension, taken here as not built"),
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_features": 65_536}, "65536 inputs; ExLlama takes up to 65535"),
        ({"zero_range": (1, 16)}, "zeros from 1 to 16; ExLlama takes 1 to 15"),
        ({"zero_range": (0, 0)}, "zeros from 0 to 0; ExLlama takes 1 to 15"),
    ],
)
def test_it_declines_what_no_small_layer_has(change: dict[str, Any], words: str) -> None:
    layer = replace(make_layer(Case(group_size=-1))[0], **change)
    verdict = ExllamaKernel().consider(layer, BUILT)
    assert isinstance(verdict, Declined)
    assert verdict.reason == words


def test_a_bfloat16_model_is_cast_and_said_so() -> None:
    layer = make_layer(Case())[0]
    plain = ExllamaKernel().consider(layer, BUILT)
    assert isinstance(plain, Accepted)
    for change in ({"model_dtype": "bfloat16"}, {"scales_dtype": "bfloat16"}):
        cast = ExllamaKernel().consider(replace(layer, **change), BUILT)
        assert isinstance(cast, Accepted)
        assert (cast.dtype, cast.rank < plain.rank) == ("float16", True)
        assert cast.note == "weights stay packed; computes in float16, cast from bfloat16"


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    """Stand in for the compiled extension."""
    made = Double()
    monkeypatch.setitem(sys.modules, "exllamav2_ext", exllama_double.module(made))
    return made


def error(module: torch.nn.Module, case: Case, rows: int) -> float:
    spec, packed, weight = make_layer(case)
    x = torch.randn(rows, spec.in_features, generator=torch.Generator().manual_seed(1))
    right = x.double() @ weight.T + (0 if packed.bias is None else packed.bias.double())
    return float((module(x).double() - right).norm() / right.norm())


TOLERANCE = 2e-3  # relative; float16 sums of 32 to 320 products measured 1.0e-3 at most
RIGHT = [
    *(
        Case(group_size=group, act_order=act, sym=sym)
        for group, act, sym in product((-1, 32, 64, 128), (False, True), (False, True))
    ),
    *(Case(rows=rows, group_size=32, columns=64) for rows in (32, 160, 320)),
    *(Case(rows=rows, group_size=-1, columns=64) for rows in (96, 288)),  # no power of two
    *(Case(columns=columns, bias=True) for columns in (8, 40, 100)),
    *(Case(dtype=dtype) for dtype in ("bfloat16", "float32")),
    Case(layout="planar"),  # 4 bits lie the same in both
]


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_what_it_accepts_is_right(case: Case, double: Double) -> None:
    spec, packed, _ = make_layer(case)
    assert isinstance(ExllamaKernel().consider(spec, BUILT), Accepted)
    module = ExllamaKernel().prepare(spec, packed, CPU)
    for rows in (1, 4, 33):
        assert error(module, case, rows) < TOLERANCE
    assert double.paths == ["fused", "fused", "dequantised"]


@pytest.mark.parametrize(
    "case",
    [
        Case(rows=192, group_size=96),
        Case(rows=192, group_size=96, act_order=False),
        Case(group_size=16),
        Case(group_size=0),
        Case(group_size=0, act_order=False),
        Case(bits=8),
    ],
    ids=str,
)
def test_what_it_declines_would_be_wrong(case: Case, double: Double) -> None:
    spec, packed, _ = make_layer(case)
    assert isinstance(ExllamaKernel().consider(spec, BUILT), Declined)
    try:
        module = ExllamaKernel().prepare(spec, packed, CPU)
        assert error(module, case, 4) > 0.05
    except (Crash, exllama_double.CheckFailed, RuntimeError, gptq.CodeTooLarge):
        pass  # not even an answer


def test_zeros_of_0_would_be_wrong(double: Double) -> None:
    case = Case(sym=False, extreme_zeros=True)
    spec, packed, _ = make_layer(case)
    with pytest.raises(gptq.CodeTooLarge):
        ExllamaKernel().prepare(spec, packed, CPU)


def test_zeros_of_15_are_right(double: Double) -> None:
    spec, packed, _ = make_layer(Case(sym=False))
    packed = replace(packed, zeros=torch.full_like(packed.zeros, 15))
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    right = x.double() @ packed.dequantize().double().T
    y = ExllamaKernel().prepare(replace(spec, zero_range=(15, 15)), packed, CPU)(x)
    assert float((y - right).norm() / right.norm()) < TOLERANCE


def test_the_checkpoints_tensors_are_left_alone(double: Double) -> None:
    for case in (Case(), Case(act_order=False)):
        spec, packed, _ = make_layer(case)
        tensors = (packed.qweight, packed.zeros, packed.scales, packed.g_idx)
        before = [it.clone() for it in tensors]
        module = ExllamaKernel().prepare(spec, packed, CPU)
        module(torch.zeros(1, 256))
        assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
        held = double.matrices[double.made].q_weight
        assert not torch.equal(held[:, :96], packed.qweight), "it rewrote its own copy"


def test_rows_in_order_are_not_permuted(double: Double) -> None:
    spec, packed, _ = make_layer(Case(act_order=False))
    ordered = ExllamaKernel().prepare(spec, packed, CPU)
    ordered(torch.zeros(1, 256))
    assert double.matrices[1].perm is None
    assert double.matrices[1].bias is not None, "y is cleared before the product, not during it"
    spec, packed, _ = make_layer(Case())
    shuffled = ExllamaKernel().prepare(spec, packed, CPU)
    shuffled(torch.zeros(1, 256))
    assert double.matrices[2].perm is not None


def test_one_scratch_is_shared_and_fits_the_largest_layer(double: Double) -> None:
    kernel = ExllamaKernel()
    shapes = [(64, 96), (256, 96), (128, 64)]
    cases = [Case(rows=rows, columns=columns, group_size=32) for rows, columns in shapes]
    model: Any = torch.nn.ModuleList(kernel.prepare(*make_layer(case)[:2], CPU) for case in cases)
    assert double.made == 0, "nothing is handed over before the largest is known"
    note = kernel.finish(model).note
    assert note == "prompts dequantise one layer at a time, in 49 kB that all share"
    scratches = {it.temp_dq.data_ptr() for it in double.matrices.values()}
    assert len(scratches) == 1
    assert {it.temp_dq.numel() for it in double.matrices.values()} == {256 * 96}
    for case, module in zip(cases, model, strict=True):
        assert error(module, case, 33) < TOLERANCE
    assert set(double.paths) == {"dequantised"}
    kernel.finish(model)
    assert double.made == 3, "handed over once"
    other = ExllamaKernel().prepare(*make_layer(cases[0])[:2], CPU)
    other(torch.zeros(1, 64))
    assert double.matrices[4].temp_dq.data_ptr() not in scratches, "another model has its own"
    del model, module
    gc.collect()
    assert not kernel.scratches, "and it goes with the last layer"


def test_a_scratch_that_is_outgrown_stays_with_those_that_hold_its_address(double: Double) -> None:
    scratch = Scratch("cpu")
    small, large = (Case(rows=rows, group_size=32) for rows in (64, 256))
    first = ExllamaLinear(*make_layer(small)[:2], device="cpu", scratch=scratch)
    first.hand_over()
    second = ExllamaLinear(*make_layer(large)[:2], device="cpu", scratch=scratch)
    second.hand_over()
    assert double.matrices[1].temp_dq.numel() == 64 * 96
    assert double.matrices[2].temp_dq.numel() == 256 * 96
    assert max(error(first, small, 33), error(second, large, 33)) < TOLERANCE


@pytest.mark.parametrize(
    ("in_features", "columns", "rows"),
    [
        (4096, 11_008, 4096),
        (11_008, 4096, 11_008),
        (576, 1536, 640),  # rounded up to a multiple of 128
        (8192, 65_536, 8192),  # the limit itself
        (8192, 152_064, 0),  # a head beyond it: the packed weight is multiplied, whatever M
    ],
)
def test_a_prompt_dequantises_layers_within_the_limit(
    in_features: int, columns: int, rows: int
) -> None:
    assert dequantised_rows(in_features, columns) == rows
    assert rows == 0 or in_features <= rows // 128 * 128


def test_a_layer_beyond_the_limit_takes_no_scratch(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_loader_kernels.exllama.shape.MAX_ELEMENTS", 1000)
    case = Case()
    module = ExllamaKernel().prepare(*make_layer(case)[:2], CPU)
    assert error(module, case, 33) < TOLERANCE
    assert double.paths == ["fused"]
    assert double.matrices[1].temp_dq.numel() == 0


@pytest.mark.parametrize(
    "case",
    [Case(), Case(act_order=False), Case(group_size=-1), Case(columns=100, bias=True, sym=False)],
    ids=str,
)
def test_it_takes_the_bytes_it_says(case: Case, double: Double) -> None:
    spec, packed, _ = make_layer(case)
    verdict = ExllamaKernel().consider(spec, BUILT)
    assert isinstance(verdict, Accepted)
    module = ExllamaKernel().prepare(spec, packed, CPU)
    assert isinstance(module, ExllamaLinear)
    held = sum(it.nbytes for name, it in module._tensors.items() if name != "gptq_g_idx")
    held += sum(it.nbytes for it in module.buffers())
    assert held == verdict.prepared_bytes


def test_no_rows_at_all_are_answered(double: Double) -> None:
    module = ExllamaKernel().prepare(*make_layer(Case(bias=True))[:2], CPU)
    assert module(torch.zeros(0, 256)).shape == (0, 96)
    assert module(torch.zeros(2, 0, 256, dtype=torch.bfloat16)).shape == (2, 0, 96)
    y = module(torch.zeros(2, 3, 256, dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((2, 3, 96), torch.bfloat16)


def test_x_that_is_not_contiguous_is_made_so(double: Double) -> None:
    module = ExllamaKernel().prepare(*make_layer(Case())[:2], CPU)
    wide = torch.randn(256, 6, generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(module(wide.t()), module(wide.t().contiguous()))


def test_what_the_extension_holds_is_freed_once(double: Double) -> None:
    kernel = ExllamaKernel()
    deleted, closed, idle = (
        kernel.prepare(*make_layer(Case(columns=columns))[:2], CPU) for columns in (32, 64, 96)
    )
    deleted(torch.zeros(1, 256))
    closed(torch.zeros(1, 256))
    assert len(double.matrices) == 2
    del deleted
    gc.collect()
    assert len(double.matrices) == 1
    assert isinstance(closed, ExllamaLinear)
    assert isinstance(idle, ExllamaLinear)
    for _ in range(2):
        closed.close()
        idle.close()
    assert not double.matrices
    for module in (closed, idle):
        with pytest.raises(gptq.GPTQLoaderError, match="is closed"):
            module(torch.zeros(1, 256))


def test_a_layer_is_not_copied_nor_run_elsewhere(double: Double) -> None:
    module = ExllamaKernel().prepare(*make_layer(Case())[:2], CPU)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(module)
    with pytest.raises(gptq.GPTQLoaderError, match="x is on meta"):
        module(torch.zeros(1, 256, device="meta"))


@dataclass
class OnCpu:
    """ExLlama as it is, for a device it would decline."""

    name: str = "exllama-double"
    kernel: ExllamaKernel = field(default_factory=ExllamaKernel)

    def consider(self, layer: Any, device: Device) -> Any:
        verdict = self.kernel.consider(layer, BUILT)
        return (
            Declined(self.name, "")
            if isinstance(verdict, Declined)
            else replace(verdict, kernel=self.name)
        )

    def prepare(self, layer: Any, packed: Any, device: Device) -> torch.nn.Module:
        return self.kernel.prepare(layer, packed, device)

    def finish(self, model: Any) -> str:
        return self.kernel.finish(model)


class Offer:
    @hookimpl
    def gptq_kernels(self) -> list[Any]:
        return [OnCpu()]


@pytest.mark.parametrize("name", [ONE, "gptq-4bit-noneg-act-sym", "gptq-4bit-64g-act-sym"])
def test_a_whole_model_answers_and_is_closed(name: str, double: Double) -> None:
    ids, right = expected(name)
    offered = gptq.Plugins(Offer(), installed=True, environ={"GPTQ_LOADER_PLUGINS": "core"})
    model = gptq.load(
        DATA / name, device="cpu", backend="exllama-double", dtype="float32", plugins=offered
    )
    assert len(double.matrices) == 14
    assert len({it.temp_dq.data_ptr() for it in double.matrices.values()}) == 1
    assert "that all share" in model.explain()
    with torch.inference_mode():
        logits = model.model(ids).logits
    assert float((logits - right).norm() / right.norm()) < 5e-3
    layer = model.model.get_submodule("model.layers.0.mlp.up_proj")
    model.close()
    assert not double.matrices
    assert isinstance(layer, ExllamaLinear)
    assert not layer._tensors, "a caller that keeps the model keeps no weights"


RAISES = "raise AssertionError('it was imported')\n"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """exllamav2 as its wheel without an extension installs it; importing it is an error."""
    folder = tmp_path / "exllamav2"
    folder.mkdir()
    (folder / "__init__.py").write_text(RAISES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(BUILD, raising=False)
    yield folder
    for name in ("exllamav2", "exllamav2.ext", "exllamav2_ext"):
        sys.modules.pop(name, None)


def test_asking_never_imports_exllamav2(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(Case())[0]
    verdict = ExllamaKernel().consider(layer, HERE)
    assert isinstance(verdict, Declined)
    assert verdict.reason.startswith("ExLlamaV2's compiled extension is not installed")
    monkeypatch.setenv(BUILD, "1")
    verdict = ExllamaKernel().consider(layer, HERE)
    assert isinstance(verdict, Accepted)
    assert verdict.note.endswith("; compiled first, for minutes")
    package.parent.joinpath("exllamav2_ext.py").write_text(RAISES)
    verdict = ExllamaKernel().consider(layer, HERE)
    assert isinstance(verdict, Accepted)
    assert "compiled" not in verdict.note
    assert not {"exllamav2", "exllamav2_ext"} & set(sys.modules)


def test_a_build_that_has_nothing_to_build_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUILD, "1")
    verdict = ExllamaKernel().consider(make_layer(Case())[0], HERE)
    assert isinstance(verdict, Declined)
    assert "pip install exllamav2" in verdict.reason


def test_it_is_compiled_where_that_was_asked_for(
    package: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (package / "__init__.py").write_text("")
    (package / "ext.py").write_text(
        "import exllama_double\ndouble = exllama_double.Double()\n"
        "ext_c = exllama_double.module(double)\n"
    )
    monkeypatch.setenv(BUILD, "1")
    case = Case()
    with caplog.at_level(logging.WARNING):
        module = ExllamaKernel().prepare(*make_layer(case)[:2], CPU)
    assert "compiling ExLlamaV2's extension, as GPTQ_LOADER_EXLLAMA_BUILD=1 asks" in caplog.text
    assert error(module, case, 1) < TOLERANCE


@pytest.mark.parametrize(
    ("built", "content", "message", "hint"),
    [
        (True, "raise ImportError('undefined symbol: c10')", "does not load with torch", "wheel"),
        (False, "raise OSError('CUDA_HOME is not set')", "could not be compiled", "nvcc"),
        (False, "raise RuntimeError('Error building\\n')", "(Error building)", "nvcc"),
    ],
)
def test_an_extension_that_does_not_load_is_an_error_in_words(
    built: bool, content: str, message: str, hint: str, package: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (package / "__init__.py").write_text("" if not built else RAISES)
    file = package.parent / "exllamav2_ext.py" if built else package / "ext.py"
    file.write_text(content)
    monkeypatch.setenv(BUILD, "1")
    with pytest.raises(gptq.PluginError) as caught:
        ExllamaKernel().prepare(*make_layer(Case())[:2], CPU)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.gpu
@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_the_real_extension_is_right(case: Case) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: only one can tell whether the double is true")
    device = find_device("cuda")
    spec, packed, weight = make_layer(case)
    if isinstance(verdict := ExllamaKernel().consider(spec, device), Declined):
        pytest.skip(verdict.reason)
    real = ExllamaKernel().prepare(spec, packed, device)
    for rows in (1, 4, 33):
        x = torch.randn(rows, spec.in_features, generator=torch.Generator().manual_seed(1))
        right = x.double() @ weight.T + (0 if packed.bias is None else packed.bias.double())
        y = real(x.to(device.torch_name)).double().cpu()
        assert float((y - right).norm() / right.norm()) < TOLERANCE
