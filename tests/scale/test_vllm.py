"""vLLM itself, with this package installed beside it: every checkpoint, and exactly.

The answers are compared in float32 with this package's own. Checkpoints with the same prompt share
one process of vLLM, which takes half a minute to start.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
from altered import DATA, NAMES
from environments import branches, needs_python_of
from vllm_checkpoints import ACT_ORDER, ALTERED, LIES, REFUSED, SHARED, V2, make
from vllm_process import BY_NAME, CLOSE, FLOAT32, Answer, ask, ours

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.host("vllm"),
    pytest.mark.timeout(1800),  # seconds: a start alone may take ten minutes
    needs_python_of("vllm"),
]

BRANCHES = branches()
BOUND = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # two workers, a core each
WITHOUT = {"VLLM_PLUGINS": ""}
# vLLM 0.32's own kernel of 8-bit activations, which it takes where there is AMX, fails on layers of
# 576 rows without groups ("shape ... is invalid"); its other one runs them.
OWN = {"VLLM_CPU_INT4_W4A8": "0"}
TEXT = (
    "The harbour was quiet before dawn. Two fishing boats had come in during the night, and their "
    "crews were unloading crates of mackerel under the yellow lamps while gulls waited on the roof "
    "of the customs house. By seven the market would open, and by nine most of the fish would be "
    "on its way inland, packed in ice that had been made the evening before."
)
HALF = {"dtype": "bfloat16", "enforce_eager": True}

needs_branches = pytest.mark.skipif(
    len(BRANCHES) < 6, reason="SmolLM2's six branches are not here; python bench/branches.py"
)


@cache
def checkpoints() -> dict[str, Answer]:
    answer = ask([DATA / it for it in NAMES], **FLOAT32, **BY_NAME)
    return dict(zip(NAMES, answer, strict=True))


@pytest.fixture(scope="module")
def altered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Answer]]:
    folder = tmp_path_factory.mktemp("altered")
    names = [it for it in ALTERED if it not in LIES]
    made = [make(it, folder / str(number)) for number, it in enumerate(names)]
    answers = ask(made, **FLOAT32, **BY_NAME)
    return dict(zip(names, zip(made, answers, strict=True), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_checkpoint_answers_as_here(name: str) -> None:
    answer, right = checkpoints()[name], ours(DATA / name)
    assert answer.off_by(right) <= CLOSE
    assert answer.following == right.following
    assert answer.quantization == "gptq_loader"


@pytest.mark.parametrize(
    "name",
    [it for it in ALTERED if it not in REFUSED | LIES],
)
def test_an_altered_checkpoint_answers_as_here(
    name: str, altered: dict[str, tuple[Path, Answer]]
) -> None:
    folder, answer = altered[name]
    right = ours(folder)
    assert answer.off_by(right) <= CLOSE
    assert answer.following == right.following


def test_what_cannot_be_fused_is_refused(altered: dict[str, tuple[Path, Answer]]) -> None:
    (name,) = REFUSED
    error = altered[name][1].error
    assert "v_proj is not" in error
    assert "hint: load it with gptq-loader" in error


def test_a_config_that_hides_act_order_is_corrected_by_default(tmp_path: Path) -> None:
    (name,) = LIES
    folder = make(name, tmp_path / "lie")
    (answer,) = ask([folder], **FLOAT32)
    assert answer.quantization == "gptq_loader"
    assert answer.off_by(ours(folder)) <= CLOSE


def test_g_idx_that_does_not_arrive_is_an_error() -> None:
    (answer,) = ask([DATA / ACT_ORDER], withhold=".g_idx", **FLOAT32)
    assert "g_idx did not arrive" in answer.error


def test_two_workers_answer_as_one(altered: dict[str, tuple[Path, Answer]]) -> None:
    alone = {
        **{DATA / it: checkpoints()[it] for it in (ACT_ORDER, V2)},
        **dict(altered[it] for it in SHARED),
    }
    together = ask(list(alone), environ=BOUND, **FLOAT32, **BY_NAME, tensor_parallel_size=2)
    for (folder, one), two in zip(alone.items(), together, strict=True):
        assert two.off_by(one) <= CLOSE, folder
        assert two.following == one.following


def test_a_compiled_model_answers_as_an_eager_one() -> None:
    options = {**FLOAT32, **BY_NAME, "enforce_eager": False}
    (compiled,) = ask([DATA / ACT_ORDER], **options)
    assert compiled.operator_calls > 0
    assert compiled.off_by(checkpoints()[ACT_ORDER]) <= CLOSE


def test_a_kernel_is_chosen_by_name_and_every_choice_is_in_the_log() -> None:
    options = {**HALF, "additional_config": {"gptq_loader": {"backend": "dense"}}}
    (answer,) = ask([DATA / ACT_ORDER], **options)
    lines = [line for line in answer.log.splitlines() if "and layers like it" in line]
    assert not answer.error
    assert len(lines) == 4  # q, k and v; o; gate and up; down
    assert all("dense: chosen" in line and "triton: " in line for line in lines)


@needs_branches
def test_six_of_six_branches_answer_as_here() -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(BRANCHES[0])(TEXT)["input_ids"]
    main = [branch for branch in BRANCHES if branch.name == "main"]  # vLLM's by default
    others = [branch for branch in BRANCHES if branch.name != "main"]
    answers = [*ask(main, ids=ids, **FLOAT32, **BY_NAME), *ask(others, ids=ids, **FLOAT32)]
    for folder, answer in zip([*main, *others], answers, strict=True):
        right = ours(folder, ids)
        off = answer.off_by(right)
        print(f"{folder.name}: {len(ids) - 1} tokens, off by at most {off:.2g}")  # noqa: T201 - pytest -rP
        assert off <= CLOSE, folder.name
        assert answer.following == right.following
        assert answer.quantization == "gptq_loader"


@needs_branches
def test_without_the_plugin_one_of_six_loads_and_with_it_that_one_is_vllms_still() -> None:
    without = ask(BRANCHES, environ={**WITHOUT, **OWN}, **HALF)
    loaded = [
        branch.name for branch, answer in zip(BRANCHES, without, strict=True) if not answer.error
    ]
    assert loaded == ["main"]
    main = next(branch for branch in BRANCHES if branch.name == "main")
    (beside,) = ask([main], environ=OWN, **HALF)
    alone = without[BRANCHES.index(main)]
    assert beside.quantization == alone.quantization == "auto_gptq"
    assert beside.logprobs == alone.logprobs
    assert beside.following == alone.following
