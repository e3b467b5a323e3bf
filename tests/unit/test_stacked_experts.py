"""Experts as one product, by the kernel for GPUs: Triton's interpreter runs it here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from processes import run_process


def test_a_mixture_looks_up_no_expert() -> None:
    pytest.importorskip("triton")
    tests = Path(__file__).parents[1]
    done = run_process(
        [sys.executable, "-W", "ignore", str(Path(__file__).parent / "stacked_experts_cases.py")],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(tests),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
