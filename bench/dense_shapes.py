"""Write a checkpoint of random bfloat16 weights in the shape of a known model.

    python bench/dense_shapes.py NAME FOLDER [--layers N]

For benchmarks against programs that compute with weights that are not quantised, and of what
quantising takes (bench/quantize_memory.py).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from shapes import SHAPES, make_checkpoint

if TYPE_CHECKING:
    from shapes import Shape

__all__ = ["write_dense"]

SHARD_BYTES = 2 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="instead of as many as the model has")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.name]
    print(write_dense(arguments.folder, replace(shape, layers=arguments.layers or shape.layers)))


def write_dense(folder: Path, shape: Shape) -> Path:
    """Write into `folder`, shard by shard, unless a finished checkpoint is there."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(0)
    # One random table serves every tensor: speed does not depend on what weights are.
    table = torch.randn(1 << 24, generator=random).to(torch.bfloat16)
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    count = 0

    def write() -> None:
        nonlocal count
        count += 1
        file = f"model-{count:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, size in _tensors(shape):
        if name.endswith("norm.weight"):
            shard[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            elements = size[0] * size[1]
            flat = table.repeat(-(-elements // len(table)))[:elements]
            scale = 1.0 if "embed" in name else size[1] ** -0.5
            shard[name] = flat.view(size) * scale
        if sum(it.nbytes for it in shard.values()) > SHARD_BYTES:
            write()
    write()
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _write_config(folder, shape)
    return folder


def _tensors(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """List the names and sizes of a model's tensors."""
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))
    ]
    for i in range(shape.layers):
        block = f"model.layers.{i}"
        found += [
            (f"{block}.{name}.weight", (outputs, inputs))
            for name, (inputs, outputs, _) in shape.linears().items()
        ]
        found += [
            (f"{block}.{name}.weight", (shape.hidden,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    found.append(("model.norm.weight", (shape.hidden,)))
    if not shape.tied:
        found.append(("lm_head.weight", (shape.vocabulary, shape.hidden)))
    return found


def _write_config(folder: Path, shape: Shape) -> None:
    """Take config.json and the tokenizer from a quantised checkpoint of one block."""
    small = make_checkpoint(folder / "quantised", replace(shape, layers=1))
    config = json.loads((small / "config.json").read_text())
    del config["quantization_config"]
    config |= {"num_hidden_layers": shape.layers, "dtype": "bfloat16"}
    for file in small.iterdir():
        if file.name.startswith("tokenizer"):
            file.rename(folder / file.name)
        else:
            file.unlink()
    small.rmdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
