"""Copies of the tests' checkpoints, altered as the world alters them, and how far off they are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import gptq_loader_plugin as gptq
from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin.checkpoint.reader import GPTQReader

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = Path(__file__).parent / "data" / "checkpoints"
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(it.name for it in DATA.glob("gptq*"))
SEQUENTIAL = [it for it in NAMES if "-noact-" in it or "-noneg-" in it]
ONE = "gptq-4bit-32g-act-sym"
# The packed CPU kernels that run here, the chosen one first: the native one needs a C++ compiler.
CPU_KERNELS = ["cpu", "cpu-int4"] if find_library() else ["cpu-int4"]
# The same kernels whatever else is installed.
PLUGINS = {"GPTQ_LOADER_PLUGINS": "core,kernel-cpu,kernel-dense,kernel-reference,attention"}

Tensors = dict[str, torch.Tensor]

# The kernels for GPUs too, which are only asked, and torch, which runs on all.
OTHERS = "kernel-exllama,kernel-torch,kernel-triton"
ALL = {"GPTQ_LOADER_PLUGINS": f"{PLUGINS['GPTQ_LOADER_PLUGINS']},{OTHERS}"}


def plugins() -> gptq.Plugins:
    return gptq.Plugins(installed=True, environ=PLUGINS)


def golden(name: str, found: str) -> None:
    """Compare with a file of tests/golden, or write it where GPTQ_LOADER_GOLDEN=write."""
    found = found.replace(str(DATA), "CHECKPOINTS")
    file = GOLDEN / name
    if os.environ.get("GPTQ_LOADER_GOLDEN") == "write":
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")


def copy(name: str, folder: Path) -> Path:
    """Copy a checkpoint into an empty folder, writable."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (DATA / name).iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def set_field(folder: Path, **fields: Any) -> None:
    """Write a field where both config files have it."""
    edit_json(folder / "quantize_config.json", lambda it: it.update(fields))
    edit_json(folder / "config.json", lambda it: it["quantization_config"].update(fields))


def only_quantize_config(folder: Path) -> None:
    """Take away what config.json says of the quantization, as AutoGPTQ of 2023 wrote none."""
    edit_json(folder / "config.json", lambda it: it.pop("quantization_config"))


def without_config(folder: Path) -> None:
    """Take away all that says how it was quantised, but not the model's shape."""
    (folder / "quantize_config.json").unlink(missing_ok=True)
    only_quantize_config(folder)


def rename_weights(folder: Path, name: str) -> None:
    """Give the weights' file another name."""
    (folder / "model.safetensors").rename(folder / name)


def read_tensors(folder: Path) -> Tensors:
    # copies: a file that is mapped cannot be written over
    return {name: it.clone() for name, it in load_file(folder / "model.safetensors").items()}


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = read_tensors(folder)
    edited = edit(tensors)
    file = folder / "model.safetensors"
    save_file(edited if isinstance(edited, dict) else tensors, file, metadata={"format": "pt"})


def expected(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, the logits GPTQModel gives for them in float32)."""
    content = load_file(DATA / "expected" / f"{name}.safetensors")
    return content["input_ids"], content["logits"]


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Relative root-mean-square error."""
    return float((found.float() - right).norm() / right.norm())


def off_by(folder: Path, name: str, **options: Any) -> float:
    """Load a checkpoint, and say how far its logits are from what GPTQModel gives for `name`."""
    ids, right = expected(name)
    options = {"backend": "reference", **options}
    with (
        gptq.load(folder, device="cpu", plugins=plugins(), **options) as model,
        torch.inference_mode(),
    ):
        return error(model.model(ids).logits, right)


def dequantized(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own model with the dequantised weights in it."""
    checkpoint = GPTQReader().open(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    weights = {
        name: checkpoint.tensor(name)
        for name in checkpoint.headers
        if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))
    }
    for name in checkpoint.layers:
        weights[f"{name}.weight"] = checkpoint.packed(name).dequantize()
    model.load_state_dict({name: it.to(dtype) for name, it in weights.items()}, strict=False)
    return model.eval()
