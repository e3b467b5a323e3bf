"""Write the checkpoints of family_configs as their repositories have them, with random codes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from altered import DATA, error
from family_configs import SIZE
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from gptq_loader_plugin.conformance.packer import write_qweight, write_qzeros
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.loading import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from family_configs import Repository

GROUP_ROWS = 32
IDS = torch.randint(0, 380, (1, 24), generator=torch.Generator().manual_seed(1))


@dataclass
class Packed:
    """One layer as GPTQ has it: codes [K, N], zeros and scales [G, N], g_idx [K], bias."""

    codes: np.ndarray[Any, Any]
    zeros: np.ndarray[Any, Any]
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None
    bits: int

    def weight(self) -> torch.Tensor:
        group = self.g_idx.long()
        shifted = torch.from_numpy(self.codes).float() - torch.from_numpy(self.zeros).float()[group]
        return (shifted * self.scales.float()[group]).t().contiguous()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        packed = {
            f"{name}.qweight": torch.from_numpy(write_qweight(self.codes, self.bits, "continuous")),
            f"{name}.qzeros": torch.from_numpy(
                write_qzeros(self.zeros, self.bits, "continuous", "v1")
            ),
            f"{name}.scales": self.scales.contiguous(),
            f"{name}.g_idx": self.g_idx.clone(),
        }
        return packed if self.bias is None else {**packed, f"{name}.bias": self.bias.half()}


def quantised(
    module: torch.nn.Linear, generator: np.random.Generator, order: Any, bits: int
) -> Packed:
    """Random codes, zeros and scales for a linear, with groups in that order."""
    middle = 1 << (bits - 1)
    rows, columns = module.in_features, module.out_features
    groups = rows // GROUP_ROWS
    return Packed(
        generator.integers(0, 2 * middle, (rows, columns), dtype=np.uint8),
        generator.integers(middle // 2, middle + middle // 2, (groups, columns), dtype=np.uint8),
        torch.from_numpy(generator.uniform(0.005, 0.02, (groups, columns))).half(),
        torch.from_numpy(order % groups).int(),
        None if module.bias is None else module.bias.data,
        bits,
    )


def side_by_side(parts: list[Packed], *, grouped: bool) -> Packed:
    """Join queries, keys and values as the repositories' own code does."""
    heads = [it.codes.shape[1] // SIZE for it in parts]
    order = [(part, head) for part, count in enumerate(heads) for head in range(count)]
    if grouped:
        order = []
        for group in range(heads[1]):
            share = heads[0] // heads[1]
            order += [(0, group * share + it) for it in range(share)]
            order += [(1, group), (2, group)]

    def join(of: list[Any], concatenate: Any) -> Any:
        return concatenate([of[p][..., h * SIZE : (h + 1) * SIZE] for p, h in order], -1)

    biases = [it.bias for it in parts]
    return Packed(
        join([it.codes for it in parts], np.concatenate),
        join([it.zeros for it in parts], np.concatenate),
        join([it.scales for it in parts], torch.cat),
        parts[0].g_idx,
        None if biases[0] is None else join(biases, torch.cat),
        parts[0].bits,
    )


def publish(repository: Repository, folder: Path, *, bits: int = 4) -> Any:
    """Write a checkpoint as its repository has it; give the model that answers the same."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_config(repository.equivalent).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = torch.randn_like(parameter) * 0.1 + (not name.endswith("bias"))
        parameter.data = parameter.data.half().float()
    linears = {
        name: it
        for name, it in model.named_modules()
        if isinstance(it, torch.nn.Linear) and it is not model.get_output_embeddings()
    }
    packed: dict[str, Packed] = {}
    orders = {it.in_features: generator.permutation(it.in_features) for it in linears.values()}
    for name, linear in linears.items():
        packed[name] = quantised(linear, generator, orders[linear.in_features], bits)
        linear.weight.data = packed[name].weight()
    tensors = {
        name: it.half()
        for name, it in model.state_dict().items()
        if name.rpartition(".")[0] not in packed
    }
    tied = model.config.tie_word_embeddings
    tensors = {name: it for name, it in tensors.items() if not tied or name != "lm_head.weight"}
    if repository.fused:
        for name in [it for it in packed if it.endswith(".q_proj")]:
            parts = [
                packed.pop(name.replace("q_proj", it)) for it in ("q_proj", "k_proj", "v_proj")
            ]
            joined = side_by_side(parts, grouped=repository.grouped)
            packed[name.replace("q_proj", repository.fused)] = joined
    for name, layer in packed.items():
        tensors |= layer.tensors(name)
    renamed = {name_in(repository, it): value for it, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(repository.stored))
    (folder / "quantize_config.json").write_text(json.dumps({
        "bits": bits, "group_size": GROUP_ROWS, "checkpoint_format": "gptq", "desc_act": True,
        "sym": False, "damp_percent": 0.1, "model_file_base_name": "model",
    }))  # fmt: skip
    for file in (DATA / "base").glob("*token*"):
        shutil.copy(file, folder)
    return model


def name_in(repository: Repository, name: str) -> str:
    """Write a tensor's name as the repository does; an end in a dot says the beginning of names."""
    for ours, theirs in repository.names:
        end = ours.endswith(".")
        pattern = rf"^{re.escape(ours)}" if end else rf"(?<!\w){re.escape(ours)}(?!\w)"
        name = re.sub(pattern, theirs, name, count=1)
    return name


def edit_config(folder: Path, **fields: Any) -> None:
    """Set fields of config.json, or take those away that are `...`."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: it for key, it in {**config, **fields}.items() if it != ...}))


def logits_error(folder: Path, model: Any) -> float:
    """Load a checkpoint; return how far its logits are from those of transformers' model."""
    loaded = load_model(folder, LoadOptions(backend="reference", device="cpu"))
    with torch.inference_mode():
        found, expected = loaded.model(IDS).logits, model(IDS).logits
    return error(found, expected)
