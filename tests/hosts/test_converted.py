"""What `convert` writes, read by transformers and by GPTQModel: logits are those of here.

GPTQ_ENGINES=1 make hosts sets their environment up; compressed-tensors is in the project's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altered
import pytest
import torch
from altered import DATA
from environments import needs_python_of, python_of
from processes import run_process
from safetensors.torch import load_file

import gptq_loader_plugin as gptq
from gptq_loader_plugin.convert.options import ConvertOptions
from gptq_loader_plugin.convert.run import convert_checkpoint
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from gptq_loader_plugin.convert.options import Format

pytestmark = pytest.mark.timeout(1800)

PROGRAM = Path(__file__).with_name("converted_program.py")
IDS = [5, 9, 20, 33, 45, 60, 61, 70, 71, 80, 95, 101, 116, 120, 133, 140]
TWO, THREE, PLAIN = (
    "gptq-2bit-64g-noact-sym", "gptq-3bit-32g-noact-asym", "gptq-4bit-noneg-act-sym",
)  # fmt: skip
ASYMMETRIC, ORDERED = "gptq_v2-4bit-64g-noact-asym", "gptq-4bit-32g-act-sym"
needs_engines = needs_python_of("engines")


def converted(names: list[str], to: Format, folder: Path) -> dict[str, Path]:
    made = {name: folder / f"{name}-{to}" for name in names}
    for name, out in made.items():
        convert_checkpoint(DATA / name, out, options=ConvertOptions(to), plugins=Plugins())
    return made


def read(
    python: Path, reader: str, folders: list[Path], folder: Path
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Have another reader compute logits of each folder."""
    out = folder / "logits.safetensors"
    job = {"folders": [str(it) for it in folders], "ids": IDS, "out": str(out)}
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "-P", PROGRAM, reader, json.dumps(job)]
    done = run_process(command, check=True, cwd=folder, env=environ, seconds=1500)
    found = json.loads(done.stdout.splitlines()[-1])
    assert not [it["error"] for it in found.values() if "error" in it]
    logits = load_file(out)
    return [logits[str(at)] for at in range(len(folders))], found


def own(name: str) -> torch.Tensor:
    with (
        gptq.load(DATA / name, device="cpu", backend="reference", dtype="float32") as model,
        torch.inference_mode(),
    ):
        return model.model(torch.tensor([IDS])).logits.float()


@needs_engines
@pytest.mark.parametrize(
    ("reader", "names", "close"),
    [
        # torch's operator takes groups of 32, 64, 128 and 256, and keeps scales in bfloat16
        ("transformers", [TWO, THREE, ASYMMETRIC], 1e-3),
        # which computes in float16
        ("gptqmodel", [TWO, THREE, PLAIN, ASYMMETRIC], 2e-3),
    ],
)
def test_awq(reader: str, names: list[str], close: float, tmp_path: Path) -> None:
    made = converted(names, "awq", tmp_path)
    python = python_of("engines")
    assert python
    logits, found = read(python, reader, list(made.values()), tmp_path)
    for name, theirs in zip(names, logits, strict=True):
        assert altered.error(theirs, own(name)) < close
        assert all("Awq" in layer for layer in found[str(made[name])])


@needs_engines
def test_gptq_v2(tmp_path: Path) -> None:
    """GPTQModel computes in float16, and with either format of zeros the same to the bit."""
    names = [TWO, THREE, PLAIN, ORDERED, ASYMMETRIC]
    pairs = [*converted(names, "gptq", tmp_path).values()]
    pairs += converted(names, "gptq_v2", tmp_path).values()
    python = python_of("engines")
    assert python
    logits, _ = read(python, "gptqmodel", pairs, tmp_path)
    for name, v1, v2 in zip(names, logits[: len(names)], logits[len(names) :], strict=True):
        assert torch.equal(v1, v2)
        assert altered.error(v2, own(name)) < 2e-3


def test_compressed_tensors(tmp_path: Path) -> None:
    """To the bit; compressed-tensors 0.20.1 makes no room in a model for packed zeros."""
    names = [TWO, THREE, PLAIN]
    made = converted(names, "compressed-tensors", tmp_path)
    logits, _ = read(Path(sys.executable), "transformers", list(made.values()), tmp_path)
    for name, theirs in zip(names, logits, strict=True):
        assert torch.equal(theirs, own(name))
