"""Write a tiny model as its published GPTQ checkpoint has it, packed by plain rounding.

Names are those that transformers saves: of the original files. What it keeps as one tensor for all
experts is written expert by expert, as GPTQModel does. None of the package's own code is used.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_configs import CAUSAL, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

TOKENIZER = Path(__file__).parents[1] / "data" / "checkpoints" / "base"
GROUP, BITS = 32, 4
PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What GPTQ's writers leave in 16 bits, and what lies outside the decoder's blocks.
LEFT = re.compile(
    r"embed|norm\w*\.weight|lm_head|\.gate\.weight|router|shared_expert_gate|conv1d|vision|visual|audio"
    r"|projector|indexer|tower|qformer|pooler|relative|position|wo_a|o_a_proj|cross_attn|crossattention|image"
)
SETTINGS = {
    "bits": BITS, "group_size": GROUP, "desc_act": False, "sym": True, "damp_percent": 0.1,
    "checkpoint_format": "gptq", "quant_method": "gptq", "model_file_base_name": "model",
}  # fmt: skip


@dataclass
class Published:
    """A tiny model in three folders.

    Attributes:
        original: as transformers saves it.
        packed: the GPTQ checkpoint.
        fused: for tensors that are saved as one for all experts, how each expert's are made of it.
    """

    original: Path
    packed: Path
    fused: dict[str, Experts] = field(default_factory=dict)


@dataclass
class Experts:
    """Where one tensor of all experts lies.

    Attributes:
        prefix: the experts' names are `{prefix}.{i}.{gate,up,down}_proj`.
        roles: what lies side by side in it.
        transposed: whether it is [experts, inputs, outputs].
        interleaved: whether gate and up alternate.
        bias: whether it is a bias, [experts, outputs].
        parameter: its name in the model, where the file has its rows in another order.
    """

    prefix: str
    roles: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    parameter: str = ""

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cut it into every expert's tensors, [outputs, inputs], by their names."""
        leaf = "bias" if self.bias else "weight"
        parts = {}
        for i, expert in enumerate(tensor):
            rows = expert.t() if self.transposed and not self.bias else expert
            step, count = len(self.roles), len(rows) // len(self.roles)
            for j, role in enumerate(self.roles):
                own = rows[j::step] if self.interleaved else rows[j * count : (j + 1) * count]
                parts[f"{self.prefix}.{i}.{role}_proj.{leaf}"] = own.contiguous()
        return parts

    def join(self, tensors: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
        """Undo `split`."""
        leaf = "bias" if self.bias else "weight"
        experts = []
        for i in range(count):
            own = [tensors[f"{self.prefix}.{i}.{role}_proj.{leaf}"] for role in self.roles]
            rows = torch.stack(own, 1).flatten(0, 1) if self.interleaved else torch.cat(own)
            experts.append(rows.t() if self.transposed and not self.bias else rows)
        return torch.stack(experts)


def auto_class(model_type: str) -> Any:
    """Return the class that builds this model type."""
    text = model_type in CAUSAL and model_type not in ("mllama", "emu3")  # whose files have both
    return AutoModelForCausalLM if text else AutoModelForImageTextToText


def publish(model_type: str, folder: Path) -> Published:
    """Write a tiny model of that type, and its GPTQ checkpoint."""
    torch.manual_seed(0)
    published = Published(folder / "original", folder / "packed")
    config = tiny_config(model_type)
    model = auto_class(model_type).from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.05
        elif "embed" not in name:
            parameter.data *= 2.0
    model.half().save_pretrained(published.original, max_shard_size="50GB")
    model.float()
    tensors = load_file(published.original / "model.safetensors")
    published.fused = _fused(model, tensors)
    for name in published.fused:
        saved, parameter = tensors.pop(name), published.fused[name].parameter
        value = model.get_parameter(parameter).data.half() if parameter else saved
        tensors |= published.fused[name].split(value)
    linears = {
        name: module for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not re.search("Router|Grouped", type(module).__name__)
    }  # fmt: skip
    parameters = dict(model.named_parameters())
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        own = linears.get(layer) or linears.get(f"{model.base_model_prefix}.{layer}")
        if _is_packed(name, tensor) and (own is not None or name not in parameters):
            weight = tensor.t() if isinstance(own, Conv1D) else tensor
            packed |= {f"{layer}.{part}": it for part, it in zip(PARTS, pack(weight), strict=True)}
        else:
            packed[name] = tensor
    published.packed.mkdir()
    save_file({name: it.contiguous() for name, it in packed.items()},
              published.packed / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    written = json.loads((published.original / "config.json").read_text())
    (published.packed / "config.json").write_text(
        json.dumps({**written, "quantization_config": SETTINGS})
    )
    (published.packed / "quantize_config.json").write_text(json.dumps(SETTINGS))
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, published.packed)
        shutil.copy(file, published.original)
    for name in ("chat_template.jinja", "generation_config.json"):  # of the tokenizer, by its ids
        shutil.copy(TOKENIZER / name, published.packed)
    return published


def dequantised(packed: Path, published: Published, folder: Path) -> PreTrainedModel:
    """Load a GPTQ checkpoint by transformers, its weights dequantised here, in float32."""
    stored = load_file(packed / "model.safetensors")
    model_type = json.loads((published.original / "config.json").read_text())["model_type"]
    tensors: dict[str, torch.Tensor] = {}
    original = load_file(published.original / "model.safetensors")
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            weight = unpack(*(stored[f"{layer}.{it}"] for it in PARTS))
            own = layer if layer in original else f"{layer}.weight"
            before = original.get(own)
            turned = before is not None and before.shape != weight.shape
            turned = turned or _is_conv1d(model_type)
            tensors[own] = weight.t().contiguous() if turned else weight
        elif part not in PARTS:
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    for name, experts in published.fused.items():
        if name not in tensors:
            joined = experts.join(tensors, len(original[name]))
            tensors[experts.parameter or name] = joined
    separate = {
        name for fused in published.fused for name in published.fused[fused].split(original[fused])
    }
    tensors = {name: it.contiguous() for name, it in tensors.items() if name not in separate}
    tensors = {**_computing_nothing(original), **tensors}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(published.original / "config.json", folder)
    model, info = auto_class(model_type).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    shutil.rmtree(folder)
    if info["missing_keys"]:
        raise KeyError(f"transformers lacks {sorted(info['missing_keys'])[:3]}")
    return model.eval()


def _computing_nothing(original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of LongCat's experts that pass on what they read: its class wants some."""
    found = {}
    for name, tensor in original.items():
        down, count = re.subn(r"(experts\.\d+)\.(gate|up)_proj", r"\1.down_proj", name)
        if count and down not in original:
            found[name] = tensor
    return found


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Round a weight [outputs, inputs] to 4 bits, symmetric, in groups as they lie, format v1."""
    rows = weight.float().t().numpy()
    grouped = rows.reshape(-1, GROUP, rows.shape[1])
    scales = np.maximum(np.abs(grouped).max(1) / 7, 1e-4).astype(np.float16)
    codes = np.clip(np.round(grouped / scales[:, None].astype(np.float32)) + 8, 0, 15)
    codes = codes.reshape(rows.shape).astype(np.uint32)
    words = sum(codes[i::8] << np.uint32(4 * i) for i in range(8))
    zeros = np.full((len(scales), rows.shape[1] // 8), 0x77777777, np.uint32)
    g_idx = np.arange(len(rows), dtype=np.int32) // GROUP
    return tuple(
        torch.from_numpy(np.ascontiguousarray(it))
        for it in (np.asarray(words, np.uint32).view(np.int32), zeros.view(np.int32), scales, g_idx)
    )


def unpack(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor
) -> torch.Tensor:
    """Dequantise a layer of 4 bits and format v1: [outputs, inputs]."""
    shifts = torch.arange(0, 32, 4)
    codes = (qweight.long()[:, None] >> shifts[:, None] & 15).reshape(-1, qweight.shape[1])
    zeros = ((qzeros.long()[:, :, None] >> shifts & 15).flatten(1) + 1) & 15
    groups = g_idx.long()
    return ((codes - zeros[groups]).float() * scales.float()[groups]).t().contiguous()


def _is_packed(name: str, tensor: torch.Tensor) -> bool:
    sizes = tensor.dim() == 2 and not any(size % 32 for size in tensor.shape)
    in_a_block = re.search(r"\.\d+\.", name) is not None
    return sizes and in_a_block and name.endswith(".weight") and not LEFT.search(name)


def _is_conv1d(model_type: str) -> bool:
    return model_type in ("gpt2", "gpt-sw3", "openai-gpt", "imagegpt")


def _fused(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, Experts]:
    """Find the tensors of all experts that are saved as one."""
    fused: dict[str, Experts] = {}
    for path, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if not isinstance(down, torch.nn.Parameter) or down.dim() != 3:
            continue
        if hasattr(module, "gate_proj"):  # all of them always run, and stay in 16 bits
            continue
        for leaf, roles in (("gate_up_proj", ("gate", "up")), ("up_proj", ("up",)),
                            ("down_proj", ("down",))):  # fmt: skip
            for bias in (False, True):
                name = f"{path}.{leaf}{'_bias' if bias else ''}"
                value = getattr(module, name.rpartition(".")[2], None)
                saved = next((it for it in _spellings(name, value, tensors)), None)
                if value is None or saved is None:
                    continue
                at_home = saved.rpartition(".")[2] == name.rpartition(".")[2]
                prefix = saved.rpartition(".")[0] if at_home else path
                turned = getattr(
                    module, "is_transposed", type(module).__name__.startswith("Llama4")
                )
                mixed = not getattr(module, "is_concatenated", True) and len(roles) > 1
                same = torch.equal(tensors[saved], value.half())
                fused[saved] = Experts(prefix, roles, turned, mixed, bias, "" if same else name)
    return fused


def _spellings(name: str, value: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """List the saved tensors that may be this parameter: of its name, or of its block and shape."""
    if value is None:
        return []
    own = [it for it in tensors if it == name or it.endswith(f".{name.removeprefix('model.')}")]
    block = re.search(r"\.\d+\.", name)
    if own or block is None:
        return own
    return [
        it for it, tensor in tensors.items()
        if block[0] in it and tensor.dim() == 3 and tensor.shape == value.shape
        and ("experts" in it or "_linear" in it)
    ]  # fmt: skip
