"""Where memory is short, each call of the native library says so, and the process lives on."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from processes import run_process
from short_of_memory import INTERPOSER

from gptq_loader_kernels.cpu.library import Isa, find_library, load_library

pytestmark = [
    pytest.mark.skipif(find_library() is None, reason="the native library was not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="puts a library before libc as Linux does"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

WORDS: dict[str, str | bool | None] = {
    "pack": "no memory to pack a layer of 256x200",
    "one row": "no memory for the activations of 1 tokens",
    "rows": "no memory for the activations of 70 tokens",
    "step": "no memory for 1 tokens",
    "prompt": "no memory for 12 tokens",
    "head": True,  # torch multiplies in its place
    "top logits": None,  # the whole head is multiplied in its place
    "bandwidth": None,
}
# Allocations of a call on one thread, at least: what the test must have seen fail.
LEAST = {"rows": 3, "prompt": 8}


def test_each_allocation_may_fail(tmp_path: Path) -> None:
    fails = tmp_path / "fails.so"
    run_process(
        ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", fails, "-ldl"],
        input=INTERPOSER, check=True,
    )  # fmt: skip
    child = run_process(
        [sys.executable, Path(__file__).with_name("short_of_memory.py")],
        env={**os.environ, "LD_PRELOAD": str(fails), "PYTHONPATH": str(Path(__file__).parent)},
        check=True,
    )
    outcome = json.loads(child.stdout)
    panels = load_library().gptq_isa() >= Isa.AVX512_BF16
    own = load_library().gptq_own_threads(-1)
    for name, words in WORDS.items():
        for threads in (1, 2):
            answers = outcome[f"{name}, {threads}"]
            assert answers["after"], (name, threads)
            if name in LEAST and not panels:
                continue
            assert len(answers["while"]) >= LEAST.get(name, 1), (name, threads)
            # Without memory for a team of the library's own, the caller does all by itself; a
            # bandwidth is no tensor, which would be right.
            right = {name != "bandwidth"} if own and threads > 1 else set[bool]()
            assert {*answers["while"], *right} == {words, *right}, (name, threads)
