"""Whole models answer as one call of transformers without a cache does."""

from __future__ import annotations

import pytest

from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin import Plugins
from gptq_loader_plugin.conformance.models import CHECKS, check_family

native = pytest.mark.skipif(find_library() is None, reason="no C++ compiler built the library")
# One of each kind: `make conformance` runs them all. Rotations by length, a window, positions that
# a class counts itself, a state that cannot be handed back, and a cache of the class's own.
SAMPLE = [
    ("reference", "phi3-longrope"),
    ("reference", "bamba"),
    ("reference", "rwkv"),
    ("reference", "minimax"),
    ("reference", "recurrent_gemma"),  # a state in its modules
    ("reference", "gemma3_text"),
    pytest.param("cpu", "llama-dynamic", marks=native),
    pytest.param("cpu", "llama-longrope", marks=native),
    pytest.param("cpu", "mistral", marks=native),
]


@pytest.mark.parametrize(("kernel", "family"), SAMPLE)
def test_replies_are_those_of_one_call(kernel: str, family: str) -> None:
    kernels = {it.name: it for it in Plugins(installed=True).kernels()}
    report = check_family(family, kernels[kernel])
    assert not report.failed
    assert report.passed.keys() == CHECKS.keys()
