"""Gradients flow through every kernel's layers to their input: what adapters are trained by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from altered import DATA, NAMES, error, plugins

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.reader import GPTQReader
from gptq_loader_plugin.device import find_device

# Of x's gradient, against float32's of the dequantised weight: the gradient itself is rounded to
# bfloat16 once, and dense and cpu-int4 multiply by a rounded weight.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
ROUNDED = 6e-3
EXACT = ("cpu", "reference")


def prepared(name: str, *, large_bias: bool) -> list[tuple[str, Any, torch.Tensor]]:
    """Every kernel's module of one layer, and the layer's weight."""
    device = find_device("cpu")
    checkpoint = GPTQReader().open(DATA / name)
    layer = checkpoint.layers["model.layers.0.mlp.down_proj"]
    packed = checkpoint.packed(layer.name)
    if large_bias:  # some models have biases of hundreds beside weights of hundredths
        layer = replace(layer, bias=True)
        packed = replace(packed, bias=torch.full((layer.out_features,), 300.0))
    return [
        (kernel.name, kernel.prepare(layer, packed, device), packed.dequantize())
        for kernel in plugins().kernels()
        if isinstance(kernel.consider(layer, device), gptq.Accepted)
    ]


@pytest.mark.parametrize("large_bias", [False, True])
@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str))
@pytest.mark.parametrize("name", NAMES)
def test_the_input_gets_its_gradient(name: str, dtype: torch.dtype, large_bias: bool) -> None:
    torch.manual_seed(0)
    for kernel, module, weight in prepared(name, large_bias=large_bias):
        x = torch.randn(2, 5, weight.shape[1]).to(dtype).requires_grad_()
        gradient = torch.randn(2, 5, weight.shape[0]).to(dtype)
        y = module(x)
        with torch.no_grad():
            assert torch.equal(module(x), y), kernel
        y.backward(gradient)
        assert x.grad is not None
        assert x.grad.dtype == dtype
        off = error(x.grad, gradient.float() @ weight)
        assert off <= (TOLERANCE[dtype] if kernel in EXACT else ROUNDED), kernel


def test_a_weight_larger_than_a_part_is_gone_through_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gptq_loader_kernels.cpu.autograd.UNPACKED_BYTES", 1)
    monkeypatch.setattr("gptq_loader_kernels.autograd.IDENTITY_ROWS", 7)
    for kernel, module, weight in prepared(NAMES[0], large_bias=True):
        x = torch.randn(3, weight.shape[1], requires_grad=True)
        gradient = torch.randn(3, weight.shape[0])
        module(x).backward(gradient)
        assert x.grad is not None
        assert error(x.grad, gradient @ weight) <= ROUNDED, kernel


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    for kernel, module, weight in prepared(NAMES[0], large_bias=False):
        x = torch.randn(3, weight.shape[1], requires_grad=True)
        with torch.no_grad():
            assert not module(x).requires_grad, kernel
        assert not module(x.detach()).requires_grad, kernel
