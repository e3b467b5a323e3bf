"""Layers of any shape, drawn by hypothesis: the CPU kernels agree with float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin import Plugins
from gptq_loader_plugin.conformance.check import consider, off_by
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.kernel import Accepted

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import Kernel

# Each multiplies float32 and float16 in float32, and rounds bfloat16's answer, or also the weight.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 5e-3}
native = pytest.mark.skipif(find_library() is None, reason="no C++ compiler built the library")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a layer that a checkpoint can hold."""
    bits, layout = draw(
        st.sampled_from([
            *((it, "continuous") for it in (2, 3, 4, 8)),
            *((it, "planar") for it in (3, 5, 6, 7)),
        ])
    )  # fmt: skip
    planar = layout == "planar"
    whole = 32 // bits if 32 % bits == 0 else 32  # rows that fill whole words
    rows = whole * draw(st.integers(1, 640 // whole))
    columns = draw(st.integers(1, 12)) * 32 if planar else draw(st.integers(8, 300))
    group_size = draw(st.one_of(st.just(-1), st.integers(1, 160)))
    sym = draw(st.booleans()) or columns * bits % 32 != 0  # else zeros are never written
    return Case(
        bits=bits,
        group_size=group_size if group_size < rows else -1,
        act_order=draw(st.booleans()),
        sym=sym,
        rows=rows,
        columns=columns,
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        bias=draw(st.booleans()),
        layout=layout,
        extreme_zeros=draw(st.booleans()),
        zeros_format=draw(st.sampled_from(["v1", "v2"])),
    )


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=native)])
def test_products_of_any_shape_are_right(name: str) -> None:
    device = find_device("cpu")
    kernel = next(it for it in Plugins(installed=True).kernels() if it.name == name)

    # derandomised: the same layers on every machine
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(
        case=cases(),
        rows=st.integers(1, 140),
        dtype=st.sampled_from(list(TOLERANCE)),
        transposed=st.booleans(),
    )
    def holds(case: Case, rows: int, dtype: torch.dtype, *, transposed: bool) -> None:
        _hold(kernel, case, rows, dtype, transposed=transposed)

    def _hold(
        kernel: Kernel, case: Case, rows: int, dtype: torch.dtype, *, transposed: bool
    ) -> None:
        spec, packed, weight = make_layer(case)
        assert isinstance(consider(kernel, spec, device), Accepted)
        x = torch.randn(rows, case.rows, generator=torch.Generator().manual_seed(rows)).to(dtype)
        right = x.double() @ weight.T + (0 if packed.bias is None else packed.bias.double())
        module = kernel.prepare(spec, packed, device)
        with torch.inference_mode():
            y = module(x.t().contiguous().t() if transposed else x)
        assert (y.dtype, y.shape) == (dtype, right.shape)
        error, _ = off_by(y, right, right)
        assert error <= TOLERANCE[dtype], f"off by {error:.1e}"

    holds()
