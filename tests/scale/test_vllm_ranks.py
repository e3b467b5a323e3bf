"""vLLM's layers shared among two and four workers multiply as those of one, act-order included.

The workers are forks, so that four fit a machine of two cores; tests/scale/test_vllm.py has two of
vLLM's own engine.
"""

from __future__ import annotations

import json
from pathlib import Path

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

PROBE = Path(__file__).parent / "ranks_probe.py"
CLOSE = 1e-4  # float32 summed in another order


@pytest.mark.parametrize("version", BOTH)
def test_two_and_four_workers_multiply_as_one(version: str) -> None:
    """Four share two heads of keys and values, so that each has a copy of one."""
    completed = run_in_vllm(
        PROBE, str(DATA / ACT_ORDER), "2", "4", environ={}, vllm=folder_of(version)
    )
    lines = completed.stdout.splitlines()
    found = [json.loads(it.removeprefix("ANSWER ")) for it in lines if it.startswith("ANSWER ")]
    assert [it["workers"] for it in found] == [2, 4], completed.stdout + completed.stderr
    assert all(it["off_by"] <= CLOSE for it in found), found
