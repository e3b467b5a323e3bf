"""Write a LoRA adapter as the package peft saves one, for a checkpoint of the tests' Llamas."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_adapter"]

RANK = 4


def write_adapter(folder: Path, checkpoint: Path, *, seed: int) -> Path:
    """Write an adapter of each block's down_proj, large enough to change what is written.

    Args:
        folder: where to write it.
        checkpoint: the model that it is for.
        seed: another one is another adapter.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(config["num_hidden_layers"]):
        path = f"base_model.model.model.layers.{i}.mlp.down_proj"
        for which, shape in (
            ("A", (RANK, config["intermediate_size"])),
            ("B", (config["hidden_size"], RANK)),
        ):
            tensors[f"{path}.lora_{which}.weight"] = torch.randn(shape, generator=random) * 0.2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4 * RANK,
        "target_modules": ["down_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    return folder
