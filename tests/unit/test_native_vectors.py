"""Vectors for other platforms: this machine's library agrees with them, a wrong one does not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from processes import run_process

from gptq_loader_kernels.cpu.library import find_library

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(find_library() is None, reason="the native library was not built"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="compiles as Linux does"),
]


def test_this_machines_library_agrees(tmp_path: Path) -> None:
    vectors, program = tmp_path / "vectors.bin", tmp_path / "vectors"
    run_process([sys.executable, ROOT / "tools" / "write_vectors.py", vectors], check=True)
    source = ROOT / "tests" / "native" / "vectors.cpp"
    run_process(["g++", "-std=c++17", "-O1", source, "-o", program, "-ldl"], check=True)
    done = run_process([program, find_library(), vectors], check=True)
    assert "104 vectors" in done.stdout
    assert ": 0 wrong" in done.stdout
    # One bit of the last right answer's exponent
    content = bytearray(vectors.read_bytes())
    at = content.rindex(b"step, 3 tokens, 8 bits")
    end = content.index(b"pack, 2 bits")  # the tests follow the blocks
    assert end < at
    content[end - 1] ^= 0x20
    vectors.write_bytes(content)
    done = run_process([program, find_library(), vectors])
    assert done.returncode == 1
    assert "wrong: step" in done.stderr
