"""The operators between products: against transformers' modules, and under torch.compile."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from elementwise_cases import ALL, NORMED, check_rotary
from processes import run_process
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_loader_kernels.attention import (
    activation_and_mul,
    add_rms_norm,
    operators,
    paged_attention,
    rms_norm,
    rotary_and_cache,
    torch_attention,
    torch_elementwise,
    write_cache,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = Path(__file__).parent / "elementwise_cases.py"
SLOW = 900  # seconds: Triton's interpreter, on a machine with other work
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_to_cpu", "item")


@pytest.mark.parametrize("case", ALL, ids=lambda it: "-".join(str(part) for part in it[1:]))
def test_they_compute_what_transformers_does(case: tuple[Any, ...]) -> None:
    check, *arguments = case
    check(*arguments)


@pytest.mark.parametrize(("family", "dtype"), NORMED)
def test_heads_are_normalised_before_they_turn(family: str, dtype: torch.dtype) -> None:
    check_rotary(family, dtype, dim=96, norms=True)
    check_rotary(family, dtype, eight=True)


def test_the_kernels_do_so_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = run_process(
        [sys.executable, "-W", "ignore", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        seconds=SLOW,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(len(ALL) + len(NORMED))


def step(x: torch.Tensor, pool: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run what surrounds the products of a layer's decode step."""
    weight = torch.ones(16)
    normed, total = add_rms_norm(rms_norm(x, weight, 1e-6), x, weight, 1e-6, style="gemma")
    query = normed.view(-1, 2, 8)
    query = rotary_and_cache(
        query, query, query, pool["cos"], pool["sin"], pool["keys"], pool["values"], pool["slots"]
    )
    attended = paged_attention(
        query, pool["keys"], pool["values"], pool["tables"], pool["lengths"], scale=0.3, window=3
    )
    write_cache(attended, attended, pool["keys"], pool["values"], pool["slots"] + 1)
    return activation_and_mul(torch.cat((attended.flatten(1), total), dim=1))


def pool() -> dict[str, torch.Tensor]:
    return {
        "keys": torch.zeros(4, 4, 2, 8), "values": torch.zeros(4, 4, 2, 8),
        "cos": torch.ones(3, 4) * 0.6, "sin": torch.ones(3, 4) * 0.8,
        "slots": torch.tensor([4, -5, 8]), "lengths": torch.tensor([1, 0, 1], dtype=torch.int32),
        "tables": torch.tensor([[1, 9], [9, 9], [2, 9]], dtype=torch.int32),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_step_is_traced_without_a_break(backend: str) -> None:
    compiled: Callable[..., torch.Tensor] = torch.compile(step, fullgraph=True, backend=backend)
    x, plain, traced = torch.randn(3, 16), pool(), pool()
    with torch.inference_mode():
        assert torch.equal(compiled(x, traced), step(x, plain))
    for name in ("keys", "values"):
        assert torch.equal(plain[name], traced[name])
        assert plain[name].any()


def test_the_operators_say_truly_what_they_return_and_change() -> None:
    x, it = torch.randn(3, 2, 8), pool()
    caches = (it["keys"], it["values"], it["slots"])
    rotated = (x, x, x, it["cos"], it["sin"], *caches, False, None, None, 1e-6, "llama", None, None)
    attended = (
        x, *caches[:2], it["tables"], it["lengths"], 0.3, None, None, None, None, None
    )  # fmt: skip
    for operator, arguments in (
        (operators._write_cache, (x, x, *caches, None, None)),
        (operators._rotary_and_cache, rotated),
        (operators._paged_attention, attended),
        (operators._rms_norm, (x, torch.ones(8), 1e-6, "llama")),
        (operators._add_rms_norm, (x, x, torch.ones(8), 1e-6, "gemma", None)),
        (operators._activation_and_mul, (x, "silu")),
    ):
        opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


class Dispatched(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_plain_torch_never_waits_for_the_device() -> None:
    x, it = torch.randn(3, 2, 8), pool()
    rotary = torch_elementwise.rotary_and_cache
    attend = torch_attention.paged_attention
    with Dispatched() as dispatched, torch.inference_mode():
        caches = (it["keys"], it["values"])
        rotary(
            x, x, x, it["cos"], it["sin"], *caches, it["slots"],
            False, None, None, 1e-6, "llama", None, None,
        )  # fmt: skip
        attend(x, *caches, it["tables"], it["lengths"], 0.3, 3, 5.0, torch.ones(2))
    assert "aten.index_put_.default" in dispatched.names
    assert "aten.tanh.default" in dispatched.names
    assert not [name for name in dispatched.names if any(word in name for word in WAITING)]
