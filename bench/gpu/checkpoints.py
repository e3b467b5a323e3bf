"""Make the checkpoints that the parts load: random weights, in the shapes of known models."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from gptq_loader_plugin.conformance.families import make_config
from gptq_loader_plugin.conformance.layers import Case, store_layer

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["GROUP", "make_family", "make_llama", "shapes"]

GROUP = 32
VOCABULARY = 512
PACKED = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj",
    "gate_up_proj", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
)  # fmt: skip


def shapes() -> ModuleType:
    """Import bench/shapes.py, whose folder is not importable: it would hide others' packages."""
    if "shapes" in sys.modules:
        return sys.modules["shapes"]
    spec = importlib.util.spec_from_file_location(
        "shapes", Path(__file__).resolve().parents[1] / "shapes.py"
    )
    if spec is None or spec.loader is None:
        raise ImportError("bench/shapes.py is not there")
    module = sys.modules["shapes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_llama(folder: Path, *, bits: int = 4, act_order: bool = False, layers: int = 2) -> Path:
    """Make a tiny Llama whose heads share keys, in groups of 128."""
    made = shapes()
    shape = made.Shape(256, 512, layers, 4, 2, VOCABULARY, 1024)
    path: Path = made.make_checkpoint(folder, shape, bits=bits, act_order=act_order, seed=bits)
    return path


def make_family(folder: Path, family: str, *, act_order: bool = False) -> Path:
    """Make a tiny model of a family of the conformance suite, its linears packed in 4 bits."""
    from transformers import AutoModelForCausalLM

    made = shapes()
    config = make_config(family)
    config.vocab_size = VOCABULARY
    config.bos_token_id, config.eos_token_id, config.pad_token_id = made.BOS, made.EOS, None
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).float().eval()
    tensors: dict[str, torch.Tensor] = {}
    packed: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.data.normal_(0, 0.3)
        if type(module) is not torch.nn.Linear:
            continue
        module.weight.data.normal_(0, module.in_features**-0.5)
        if not name.endswith(PACKED) or module.in_features % GROUP:
            continue
        packed.add(name)
        case = Case(
            group_size=GROUP, act_order=act_order, sym=False, rows=module.in_features,
            columns=module.out_features, bias=module.bias is not None,
        )  # fmt: skip
        stored = store_layer(case)
        tensors[f"{name}.qweight"] = torch.from_numpy(stored.qweight)
        tensors[f"{name}.qzeros"] = torch.from_numpy(stored.qzeros)
        tensors[f"{name}.scales"] = stored.scales
        if stored.g_idx is not None:
            tensors[f"{name}.g_idx"] = torch.from_numpy(stored.g_idx)
        if stored.bias is not None:
            tensors[f"{name}.bias"] = stored.bias
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in packed:
            tensors[name] = tensor.half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "bits": 4, "group_size": GROUP, "desc_act": act_order, "sym": False,
        "quant_method": "gptq", "checkpoint_format": "gptq",
    }  # fmt: skip
    content = {
        **config.to_dict(), "architectures": [type(model).__name__], "dtype": "float16",
        "quantization_config": quantization,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    made.write_tokenizer(folder, VOCABULARY, 512)
    return folder
