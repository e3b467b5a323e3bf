"""A kernel's answers against float64, over the whole table of what GPTQ checkpoints hold."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch

from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.kernel import Accepted, Declined

if TYPE_CHECKING:
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel

# Relative root-mean-square error of a product, by the dtype the kernel says it computes in.
# float32 sums of some hundred products; float16 has 11 bits of mantissa and bfloat16 8, and x, the
# weight and y are each rounded once or twice (bfloat16: 3e-3 measured for torch's own linear).
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 8e-3}
GROUPS = (-1, 32, 64, 128, 96, 16, 0)  # 96 does not divide 256; 0 is groups of unequal sizes
PERMUTATIONS = [
    Case(bits=bits, group_size=group, act_order=act, sym=sym)
    for bits, group, act, sym in product((2, 3, 4, 8), GROUPS, (False, True), (False, True))
]
ODD = [
    *(Case(bits=bits, group_size=32, sym=False, extreme_zeros=True) for bits in (2, 3, 4, 8)),
    *(Case(bits=bits, layout="planar", sym=False) for bits in (2, 3, 4, 5, 6, 7, 8)),
    *(Case(rows=rows, columns=64) for rows in (32, 160, 576)),  # groups longer than K, a short last
    *(Case(columns=columns) for columns in (32, 40, 100)),
    *(Case(bits=bits, bias=True) for bits in (3, 4)),
    *(Case(bits=bits, dtype=dtype) for bits in (3, 4) for dtype in ("bfloat16", "float32")),
]


@pytest.mark.parametrize("case", [*PERMUTATIONS, *ODD], ids=str)
def test_product_is_right_or_declined(kernel: Kernel, device: Device, case: Case) -> None:
    """Every cell is accepted and right, or declined with a reason."""
    spec, packed, weight = make_layer(case)
    verdict = kernel.consider(spec, device)
    if isinstance(verdict, Declined):
        assert verdict.reason.strip()
        pytest.skip(f"{kernel.name}: {verdict.reason}")
    module = kernel.prepare(spec, packed, device)
    for shape in ((1, spec.in_features), (17, spec.in_features), (2, 3, spec.in_features)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device.torch_name)
        with torch.inference_mode():
            y = module(x)
        expected = x.double().cpu() @ weight.T
        if packed.bias is not None:
            expected = expected + packed.bias.double()
        assert y.shape == (*shape[:-1], spec.out_features)
        assert y.dtype == x.dtype
        error = float((y.double().cpu() - expected).norm() / expected.norm())
        assert error < TOLERANCE[verdict.dtype], f"off by {error:.2e}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_answers_in_the_dtype_of_x(kernel: Kernel, device: Device, dtype: str) -> None:
    """A model in any floating dtype can use the module."""
    module = _prepared(kernel, device, Case())
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).to(
        device.torch_name, getattr(torch, dtype)
    )
    with torch.inference_mode():
        assert module(x).dtype == x.dtype


def test_takes_x_that_is_not_contiguous(kernel: Kernel, device: Device) -> None:
    """Attention hands over transposed views."""
    module = _prepared(kernel, device, Case())
    wide = torch.randn(256, 6, generator=torch.Generator().manual_seed(1)).to(device.torch_name)
    with torch.inference_mode():
        torch.testing.assert_close(module(wide.t()), module(wide.t().contiguous()))


def test_leaves_the_checkpoint_tensors_alone(kernel: Kernel, device: Device) -> None:
    """`prepare` may be called twice on the same tensors, which may be mapped read-only."""
    spec, packed, _ = make_layer(Case())
    if isinstance(verdict := kernel.consider(spec, device), Declined):
        pytest.skip(f"{kernel.name}: {verdict.reason}")
    before = [it.clone() for it in (packed.qweight, packed.zeros, packed.scales, packed.g_idx)]
    kernel.prepare(spec, packed, device)
    after = (packed.qweight, packed.zeros, packed.scales, packed.g_idx)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_says_what_it_accepts(kernel: Kernel, device: Device) -> None:
    """`consider` answers with its own name, a dtype of torch and the bytes it will take."""
    verdict = kernel.consider(make_layer(Case())[0], device)
    assert verdict.kernel == kernel.name
    if isinstance(verdict, Accepted):
        assert verdict.dtype in TOLERANCE
        assert verdict.prepared_bytes > 0


def _prepared(kernel: Kernel, device: Device, case: Case) -> torch.nn.Module:
    spec, packed, _ = make_layer(case)
    if isinstance(verdict := kernel.consider(spec, device), Declined):
        pytest.skip(f"{kernel.name}: {verdict.reason}")
    return kernel.prepare(spec, packed, device)
