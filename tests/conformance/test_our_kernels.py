"""The conformance suite on our kernels that run here, and the table of what each declines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gptq_loader_kernels._native import find_library

GOLDEN = Path(__file__).parents[1] / "golden"
SKIPPED = re.compile(r"SKIPPED \[(\d+)\] .*?: ([\w-]+: .*)")


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int4", "dense", "reference"])
def test_it_conforms_and_declines_only_what_it_says(kernel: str, tmp_path: Path) -> None:
    if kernel == "cpu" and find_library() is None:
        pytest.skip("the native library was not built: no C++ compiler")
    suite = ("-m", "pytest", "--pyargs", "gptq_loader_plugin.conformance", "-q", "-rs")
    done = subprocess.run(
        [sys.executable, *suite, "-W", "error", "--kernel", kernel, "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    reasons: Counter[str] = Counter()
    for count, words in SKIPPED.findall(done.stdout):
        reasons[words] += int(count)
    lines = [f"{count:>4}  {words}\n" for words, count in sorted(reasons.items())]
    file = GOLDEN / f"conformance-{kernel}.txt"
    if os.environ.get("GPTQ_LOADER_GOLDEN") == "write":
        file.write_text("".join(lines), encoding="utf-8")
    assert "".join(lines) == file.read_text(encoding="utf-8")
