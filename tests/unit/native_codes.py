"""The native library's code paths, as parameters of tests: those that this processor runs."""

from __future__ import annotations

import pytest

from gptq_loader_kernels.cpu.library import Activations, Isa, find_library, load_library

__all__ = ["CODES", "EXACT_CODES", "Code", "runs"]

Code = tuple[Isa, Activations]


def runs(isa: Isa) -> bool:
    """Whether this processor runs the code for an instruction set."""
    return find_library() is not None and isa <= load_library().gptq_isa()


def _parameters(*activations: Activations) -> list[object]:
    codes = [(isa, Activations.FLOAT32) for isa in list(Isa)[:-1]]
    codes += [
        (isa, it)
        for isa in (Isa.AVX2, Isa.AVX_VNNI, Isa.AVX512_VNNI, Isa.AVX512_BF16)
        for it in activations
    ]
    return [
        pytest.param(code, id="-".join(it.name for it in code), marks=_mark(code)) for code in codes
    ]


def _mark(code: Code) -> pytest.MarkDecorator:
    isa, activations = code
    reason = f"this processor does not run {isa.name} with {activations.name}"
    return pytest.mark.skipif(not runs(isa), reason=reason)


EXACT_CODES = _parameters(Activations.INT16)
CODES = _parameters(Activations.INT16, Activations.INT8)
