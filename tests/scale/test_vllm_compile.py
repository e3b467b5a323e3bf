"""vLLM's linear layers under torch.compile: traced whole, once for layers alike, without waiting.

What a CUDA graph needs is checked without a GPU: no operator that reads a value of a tensor, on
which the processor would wait for the device, and none whose result's shape depends on one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from altered import DATA
from environments import needs_python_of
from vllm_checkpoints import ACT_ORDER
from vllm_process import run_in_vllm
from vllm_versions import BOTH, folder_of

pytestmark = [
    pytest.mark.host("vllm"),
    pytest.mark.timeout(1800),  # seconds: a start alone may take ten minutes
    needs_python_of("vllm"),
]

PROBE = Path(__file__).parent / "compile_probe.py"
LAYERS = 4  # of a block: q, k and v in one; o; gate and up in one; down
SHAPES = 2  # graphs: one row, and any number of rows
INTERPRETED = {"TRITON_INTERPRET": "1"}  # the kernel for GPUs, on the CPU


def probe(version: str, backend: str) -> dict[str, Any]:
    completed = run_in_vllm(
        PROBE, str(DATA / ACT_ORDER), backend, environ=INTERPRETED, vllm=folder_of(version)
    )
    answers = [line for line in completed.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, completed.stdout + completed.stderr
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix("ANSWER "))
    return answer


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("version", BOTH)
def test_a_block_is_one_graph_that_waits_for_nothing(version: str, backend: str) -> None:
    answer = probe(version, backend)
    assert answer["off_by"] <= 1e-5
    assert answer["calls"] == LAYERS
    assert answer["compiles"] <= SHAPES
    assert answer["same_graph"], "vLLM would compile each layer anew"
    assert not answer["named"]
    assert not answer["waits"]
    if backend == "triton":
        assert answer["operators"].count("gptq_loader.multiply_packed.default") == LAYERS
