"""What `quantize` writes, read by other engines: logits are those of here.

GPTQ_ENGINES=1 make hosts sets their environment up. Of engines that need a GPU, their own checks of
a checkpoint are run.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import altered
import pytest
import torch
from altered import DATA
from environments import needs_python_of, python_of
from processes import run_process
from test_converted import IDS, read
from test_where import described

import gptq_loader_plugin as gptq
from gptq_loader_plugin.quantize import QuantizeOptions, quantize_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.timeout(1800), needs_python_of("engines")]

CHOICES: dict[str, dict[str, Any]] = {
    "by default": {},
    "group-aware": {"order": "group-aware"},
    "8 bits": {"bits": 8},
    "zeros of v2": {"checkpoint_format": "gptq_v2", "sym": False},
    "two widths": {"size": "6bpw", "widths": (4, 8)},
    "four widths": {"size": "4.5bpw"},
}
# AutoRound's loader takes 2, 4 and 8 bits; by layer it reads no `dynamic`.
BY_AUTO_ROUND = ("by default", "group-aware", "8 bits")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    small: dict[str, Any] = {"samples": 4, "seq_len": 64, "group_size": 32}
    for name, choice in CHOICES.items():
        if "size" in choice:
            small = {it: value for it, value in small.items() if it != "group_size"}
        options = QuantizeOptions(**{**small, **choice})
        quantize_model(DATA / "base", folder / name, options=options)
    return {name: folder / name for name in CHOICES}


def own(folder: Path) -> torch.Tensor:
    with (
        gptq.load(folder, device="cpu", backend="reference", dtype="float32") as model,
        torch.inference_mode(),
    ):
        return model.model(torch.tensor([IDS])).logits.float()


@pytest.mark.parametrize(
    ("reader", "names", "close"),
    # GPTQModel computes in float16, and AutoRound in bfloat16.
    [("gptqmodel", tuple(CHOICES), 2e-3), ("auto-round", BY_AUTO_ROUND, 5e-3)],
)
def test_logits_are_those_of_here(
    reader: str, names: tuple[str, ...], close: float, made: dict[str, Path], tmp_path: Path
) -> None:
    python = python_of("engines")
    assert python
    logits, _ = read(python, reader, [made[name] for name in names], tmp_path)
    for name, theirs in zip(names, logits, strict=True):
        assert altered.error(theirs, own(made[name])) < close, name


@pytest.mark.parametrize("engine", ["sglang", "sglang-cpu", "vllm+humming"])
def test_checks_of_other_engines_pass(engine: str, made: dict[str, Path]) -> None:
    python = python_of("engines")
    assert python
    program = __file__.replace("test_quantized.py", "where_program.py")
    asked = json.dumps([described(made[name]) for name in ("by default", "group-aware")])
    completed = run_process([python, "-P", program, engine], input=asked, seconds=900)
    (line,) = [it for it in completed.stdout.splitlines() if it.startswith("ANSWERS ")]
    assert json.loads(line.removeprefix("ANSWERS ")) == ["", ""]
