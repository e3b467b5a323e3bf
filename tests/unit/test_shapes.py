"""bench/shapes.py makes checkpoints that load, and whose replies do not degenerate."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from altered import plugins

import gptq_loader_plugin as gptq


def shapes() -> Any:
    file = Path(__file__).parents[2] / "bench" / "shapes.py"
    spec = importlib.util.spec_from_file_location("shapes", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("bits", "group_size", "act_order", "tied"),
    [(4, 128, True, False), (4, 32, False, True), (3, -1, True, False), (6, 64, True, True)],
)
def test_what_is_made_loads(
    tmp_path: Path, bits: int, group_size: int, act_order: bool, tied: bool
) -> None:
    made = shapes()
    small = made.Shape(192, 320, 2, 6, 2, 400, 128, tied=tied)
    made.make_checkpoint(
        tmp_path, small, bits=bits, group_size=group_size, act_order=act_order, seed=1
    )
    with gptq.load(tmp_path, device="cpu", plugins=plugins()) as loaded:
        config = loaded.plan.config
        assert (config.bits, config.group_size, config.sym) == (bits, group_size, True)
        assert config.desc_act == act_order
        assert not loaded.warnings
        with torch.inference_mode():
            logits = loaded.model(torch.arange(16)[None]).logits.float()
        assert 0.5 < float(logits.std()) < 2
        options = gptq.GenerateOptions(max_new_tokens=16, temperature=0)
        assert loaded.generate("words", options).tokens == 16


def test_the_same_bytes_again_and_not_twice(tmp_path: Path) -> None:
    made = shapes()
    small = replace(made.SHAPES["SmolLM2-135M"], hidden=64, inner=96, layers=1, heads=2, kv_heads=1)
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        made.make_checkpoint(folder, small, act_order=True)
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    (tmp_path / "a" / "model.safetensors").write_bytes(b"")
    made.make_checkpoint(tmp_path / "a", small, bits=8)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == b""
