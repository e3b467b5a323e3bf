"""Layers that read the same x are multiplied as one, and go on to be multiplied alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from columns import check_joined, cut

from gptq_loader_kernels.dense import DenseKernel
from gptq_loader_kernels.reference import ReferenceKernel
from gptq_loader_kernels.torch import TorchKernel
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import Kernel

CPU = Device("cpu")
KERNELS = [ReferenceKernel(), DenseKernel(), TorchKernel()]
CASES = [
    Case(bits=bits, act_order=act_order, sym=act_order, bias=not act_order, columns=160)
    for bits in (2, 3, 4, 8)
    for act_order in (False, True)
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda it: it.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_joined_layers_multiply_as_they_do_alone(kernel: Kernel, case: Case) -> None:
    spec, packed, _ = make_layer(case)
    x = torch.randn(3, spec.in_features, generator=torch.Generator().manual_seed(0))
    check_joined(kernel, CPU, (spec, packed), (96, 32, 32), x)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda it: it.name)
def test_what_is_not_laid_out_alike_is_not_joined(kernel: Kernel) -> None:
    spec, packed, _ = make_layer(Case(columns=64))
    (one, two) = (kernel.prepare(*it, CPU) for it in cut(spec, packed, (32, 32)))
    first: Any = one
    biased = replace(packed, bias=torch.ones(64, dtype=torch.float16))
    others = [kernel.prepare(replace(spec, bias=True), biased, CPU), torch.nn.Linear(256, 64)]
    assert all(first.join([it]) is None for it in others)
    assert first.join([two, others[0]]) is None
    with torch.inference_mode():  # nothing was half joined
        assert torch.equal(
            first(torch.eye(256)), kernel.prepare(*cut(spec, packed, (32,))[0], CPU)(torch.eye(256))
        )


def test_rows_in_another_order_are_not_joined() -> None:
    spec, packed, _ = make_layer(Case(columns=32))
    other = replace(packed, g_idx=packed.g_idx.flip(0))
    one: Any = TorchKernel().prepare(spec, packed, CPU)
    assert one.join([TorchKernel().prepare(spec, other, CPU)]) is None
