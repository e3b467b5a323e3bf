"""EvalPlus itself, by the command in docs/evaluation.md, on two problems made here."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING
from urllib.request import urlopen

import pytest
from environments import needs_python_of, python_of
from processes import run_process
from server_process import ONE, serving

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    needs_python_of("evalplus"),
    pytest.mark.host("evalplus"),
    pytest.mark.timeout(1200),  # seconds: it imports torch and transformers
]


def problem(number: int, name: str, body: str) -> dict[str, object]:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def {name}(a, b):\n    """{name.title()} a and b."""\n',
        "entry_point": name,
        "canonical_solution": f"    return {body}\n",
        "test": "",
        "base_input": [[2, 3], [0, 1]],
        "plus_input": [[-1, 1]],
        "contract": "",
        "atol": 0,
    }


def test_the_documented_command(tmp_path: Path) -> None:
    problems = [problem(0, "add", "a + b"), problem(1, "multiply", "a * b")]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(f"{json.dumps(it)}\n" for it in problems))
    python = python_of("evalplus")
    assert python
    with serving() as server:
        base = f"{server.url}/v1"
        options = ["--dataset", "humaneval", "--backend", "openai", "--base-url", base, "--greedy"]
        done = run_process(
            [python.with_name("evalplus.evaluate"), "--model", ONE, *options],
            cwd=tmp_path, seconds=900,
            env={**os.environ, "OPENAI_API_KEY": "none", "HUMANEVAL_OVERRIDE_PATH": str(file),
                 "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        requests = [it for it in server.requests() if it["route"] == "/v1/chat/completions"]
        with urlopen(f"{base}/models", timeout=60) as listed:
            models = [it["id"] for it in json.load(listed)["data"]]
    assert "pass@1" in done.stdout
    assert [it["status"] for it in requests] == [200, 200]
    assert ONE in models, "the name is that of the list of models"
    [raw] = (tmp_path / "evalplus_results").rglob("*.raw.jsonl")
    solutions = [json.loads(line) for line in raw.read_text().splitlines()]
    assert [it["task_id"] for it in solutions] == [it["task_id"] for it in problems]
    assert all(it["solution"] for it in solutions)
