"""transformers itself, the newest and 5.6: the model card's Python on real checkpoints."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from environments import branches, python_of
from processes import run_process

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE = DATA / "gptq-3bit-32g-noact-asym"
PROGRAM = Path(__file__).parent / "transformers_program.py"
REPOSITORY = "owner/SmolLM2-135M-GPTQ"
REAL = branches()
# Words that any English answer has some of.
COMMON = re.compile(
    r"\b(the|a|an|and|of|to|in|is|that|it|for|with|as|I|my|you|are|can|has|this|be|by|on)\b"
)

pytestmark = pytest.mark.host("transformers")


@pytest.fixture(scope="module", params=["project", "transformers-oldest"])
def python(request: pytest.FixtureRequest) -> Path:
    """The Python of the project's environment, or of one with the oldest transformers."""
    if request.param == "project":
        return Path(sys.executable)
    python = python_of(request.param)
    if python is None:
        pytest.skip(f"no environment {request.param}; make hosts sets it up")
    return python


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub's with one repository, a branch for each checkpoint."""
    folder = tmp_path_factory.mktemp("hub")
    repository = folder / f"models--{REPOSITORY.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    for number, checkpoint in enumerate([ONE, *REAL]):
        commit = f"{number:040x}"
        (repository / "snapshots" / commit).symlink_to(checkpoint)
        (repository / "refs" / checkpoint.name).write_text(commit)
        if checkpoint.name == "main" or (number == 0 and not REAL):
            (repository / "refs" / "main").write_text(commit)
    return folder


def run(python: Path, *arguments: object, cache: Path | None = None) -> dict[str, Any]:
    offline = {} if cache is None else {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [python, PROGRAM, *arguments]
    completed = run_process(command, env={**os.environ, **offline}, check=True)
    answer: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("branch", [branch.name for branch in REAL] or [ONE.name])
def test_the_model_cards_python(python: Path, cache: Path, branch: str) -> None:
    answer = run(python, "card", REPOSITORY, branch, cache=cache)
    assert answer["class"] == "LlamaForCausalLM"
    assert answer["kernels"]
    assert answer["greedy"] == answer["loaded"]
    if REAL:
        text = "\n".join(answer[key] for key in ("generated", "piped", "greedy"))
        # three bits without groups know few words: its perplexity is the worst of the six
        least = 4 if branch.startswith("gptq-3bit--1g") else 8
        assert len(COMMON.findall(text)) >= least, text


@pytest.mark.parametrize("checkpoint", [ONE, *REAL[:1]], ids=lambda path: path.name)
def test_a_saved_checkpoint_loads_again(python: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert run(python, "save", checkpoint, "main", tmp_path)["same"]


@pytest.mark.parametrize("checkpoint", [ONE, *REAL[:1]], ids=lambda path: path.name)
def test_an_adapter_is_trained_on_top(python: Path, checkpoint: Path, tmp_path: Path) -> None:
    if run_process([python, "-c", "import peft"]).returncode:
        pytest.skip("peft is not installed there")
    answer = run(python, "lora", checkpoint, "main", tmp_path)
    assert answer["trained"] == 2 * answer["layers"]
    assert answer["losses"][-1] < answer["losses"][0]
    assert answer["same"]
    assert answer["changed"]
    assert answer["restored"]
    assert answer["generates_the_same"]
    assert answer["by_name"] <= 2e-2  # its adapter's weights are in the model's dtype
