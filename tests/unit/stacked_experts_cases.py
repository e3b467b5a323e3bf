"""Mixtures whose experts a kernel has stacked, checked by Triton's interpreter; a program."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from altered import plugins
from columns import cut
from torch.library import opcheck

from gptq_loader_kernels.triton import TritonKernel
from gptq_loader_kernels.triton.experts import TritonExperts, multiply_experts
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.conformance.models import make_subject
from gptq_loader_plugin.device import Device, find_device
from gptq_loader_plugin.engine.paged_engine import PagedEngine
from gptq_loader_plugin.kernel import Stackable
from gptq_loader_plugin.model.experts import PackedExperts

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from step_operators import Operators

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# What asks a device for a value, and waits for it.
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "item"}
KERNEL, CPU = TritonKernel(), Device("cpu")


def check_products() -> int:
    """Compare with float64: each width, parts beside each other, one row to many of an expert."""
    checked = 0
    for bits, act_order, bias, columns, rows in (
        (4, True, False, (32, 64), ((1, 2), (4, 1), (14, 2))),
        (3, False, True, (32, 32), ((2, 2),)),
        (2, True, True, (40,), ((8, 2),)),
        (8, False, False, (40,), ((3, 1),)),
    ):
        layers = [
            make_layer(
                Case(
                    bits=bits, act_order=act_order, bias=bias, columns=sum(columns), sym=False,
                    zeros_format=zeros, extreme_zeros=extreme,
                )
            )
            for zeros, extreme in (("v1", False), ("v2", False), ("v1", True))  # seeds of their own
        ]  # fmt: skip
        experts = [
            [KERNEL.prepare(*part, CPU) for part in cut(spec, packed, columns)]
            for spec, packed, _ in layers
        ]
        assert isinstance(experts[0][0], Stackable)
        stacked = experts[0][0].stack(experts)
        assert isinstance(stacked, TritonExperts)
        for tokens, k in rows:
            draw = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, stacked.in_features, generator=draw).half()
            chosen = torch.rand(tokens, 3, generator=draw).argsort(1)[:, :k].flatten()
            y = stacked(x, chosen)
            assert y.shape == (tokens * k, sum(columns))
            assert y.dtype == x.dtype
            for row, expert in enumerate(chosen.tolist()):
                _, packed, weight = layers[expert]
                right = x[row // k].double() @ weight.T
                right += 0 if packed.bias is None else packed.bias.double()
                error = float((y[row].double() - right).norm() / right.norm())
                assert error < 1e-3, (bits, tokens, row, error)
                checked += 1
            parts = torch.cat([part(x[:1]) for part in experts[int(chosen[0])]], dim=1)
            torch.testing.assert_close(parts[0], y[0], rtol=2e-3, atol=2e-3)  # as before
    return checked


def check_operator() -> None:
    spec, packed, _ = make_layer(Case())
    experts = [[KERNEL.prepare(spec, packed, CPU)] for _ in range(2)]
    it = experts[0][0].stack(experts)
    arguments = (
        torch.randn(3, it.in_features).half(), torch.tensor([0, 1, 0]), it.words, it.table, it.bits,
        it.out_features, it.group_shift, it.scales, it.tiles, it.multiprocessors, torch.float16,
    )  # fmt: skip
    opcheck(multiply_experts, arguments, test_utils=("test_schema", "test_faketensor"))
    other, packed, _ = make_layer(Case(group_size=64))
    assert experts[0][0].stack([*experts, [KERNEL.prepare(other, packed, CPU)]]) is None


def check_step(family: str) -> None:
    """A step waits for nothing, is traced whole, and answers as experts looked up one by one."""
    attention = plugins().hook.gptq_paged_attention(device=find_device("cpu"))
    subject = make_subject(family, KERNEL, attention)
    engine = subject.engine
    assert isinstance(engine, PagedEngine)
    assert engine._fused is not None
    mixtures = [it for it in subject.model.modules() if isinstance(it, PackedExperts)]
    assert mixtures
    table = engine.make(subject.model)
    engine.step([[5, 6, 7]], [table], [3])
    inputs = (
        torch.tensor([9]), torch.tensor([3]), torch.tensor(table.reserve(1)),
        torch.tensor([table.blocks], dtype=torch.int32), torch.tensor([4], dtype=torch.int32),
    )  # fmt: skip
    with torch.inference_mode():
        with Operators() as dispatched:
            right = engine._run(*inputs)
        assert "multiply_experts" in dispatched.names
        assert not SYNCHRONISING & set(dispatched.names), family
        with asked_before(engine, mixtures):
            step = torch.compile(engine._run, fullgraph=True, backend="eager")
            torch.testing.assert_close(step(*inputs), right)
        for module in mixtures:  # whose experts a hook watches now
            module.experts[0]["down"].register_forward_hook(lambda *_: None)
        with Operators() as dispatched:
            looked_up = engine._run(*inputs)
        assert "multiply_experts" not in dispatched.names
        torch.testing.assert_close(looked_up, right, rtol=1e-2, atol=1e-2)


@contextmanager
def asked_before(engine: PagedEngine, mixtures: Sequence[PackedExperts]) -> Iterator[None]:
    """Have whether anything was changed answered without looking: it is asked outside a graph."""
    stacked = [it._stacked for it in mixtures]
    kept = [it.watch for it in stacked]
    engine._fused.unchanged = lambda: True
    for it in stacked:
        object.__setattr__(it, "watch", Unchanged())
    try:
        yield
    finally:
        del engine._fused.unchanged
        for it, watch in zip(stacked, kept, strict=True):
            object.__setattr__(it, "watch", watch)


class Unchanged:
    """What a watch answers where nothing was changed."""

    def unchanged(self) -> bool:
        return True


if __name__ == "__main__":
    assert check_products() == 57
    check_operator()
    check_step("qwen2_moe")
