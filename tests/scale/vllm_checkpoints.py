"""Checkpoints for vLLM to load, refuse or mistake: the tests' own, altered."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from altered import (
    Tensors,
    copy,
    edit_json,
    edit_tensors,
    only_quantize_config,
    rename_weights,
    set_field,
    without_config,
)

from gptq_loader_plugin.kernel.packing import pack_columns, pack_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ACT_ORDER = "gptq-4bit-32g-act-sym"
V2 = "gptq_v2-3bit-64g-act-asym"
SEQUENTIAL = "gptq_v2-4bit-64g-noact-asym"
BITS, GROUP = 4, 32
ROUTED = 8  # experts: a router of fewer columns fills no packed word
KV_HEADS = 2


def make(name: str, folder: Path) -> Path:
    """Make the altered checkpoint of that name, one of ALTERED."""
    source, alter = ALTERED[name]
    alter(copy(source, folder))
    return folder


def legacy_name(folder: Path) -> None:
    only_quantize_config(folder)
    rename_weights(folder, "gptq_model-4bit-32g.safetensors")


def labelled_v1(folder: Path) -> None:
    set_field(folder, checkpoint_format="gptq")


def labelled_in_order(folder: Path) -> None:
    set_field(folder, desc_act=False)


def without_g_idx(folder: Path) -> None:
    edit_tensors(folder, lambda it: {k: v for k, v in it.items() if not k.endswith(".g_idx")})


def own_orders(folder: Path) -> None:
    """Quantise q, k and v, gate and up anew, each with rows in an order of its own."""

    def edit(tensors: Tensors) -> None:
        for number, name in enumerate(("self_attn.q", "self_attn.k", "mlp.up")):
            prefix = f"model.layers.0.{name}_proj"
            _quantize(tensors, prefix, _random(tensors, prefix, number), seed=number)

    edit_tensors(folder, edit)


def biased(folder: Path) -> None:
    """Give layers biases that the model's config does not tell of, as AutoGPTQ may."""

    def edit(tensors: Tensors) -> None:
        for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
            scales = tensors[f"model.layers.0.{name}.scales"]
            noise = torch.randn(scales.shape[1], generator=torch.Generator().manual_seed(1))
            tensors[f"model.layers.0.{name}.bias"] = (0.1 * noise).to(scales.dtype)

    edit_tensors(folder, edit)


def partly_plain(folder: Path) -> None:
    """Leave an MLP as it was, by a rule of `dynamic`."""
    set_field(folder, dynamic={r"-:.*layers\.1\.mlp\..*": {}})

    def edit(tensors: Tensors) -> None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.layers.1.mlp.{name}"
            weight = _random(tensors, prefix, 5)
            _drop(tensors, prefix)
            tensors[f"{prefix}.weight"] = weight.to(torch.bfloat16)

    edit_tensors(folder, edit)


def half_joined(folder: Path) -> None:
    """Leave v as it was, beside q and k, which vLLM joins it with."""

    def edit(tensors: Tensors) -> None:
        prefix = "model.layers.0.self_attn.v_proj"
        weight = _random(tensors, prefix, 5)
        _drop(tensors, prefix)
        tensors[f"{prefix}.weight"] = weight.to(torch.bfloat16)

    edit_tensors(folder, edit)


def quantized_head(folder: Path) -> None:
    """Quantise the output head."""
    set_field(folder, lm_head=True)

    def edit(tensors: Tensors) -> None:
        weight = tensors.pop("lm_head.weight").float()
        _quantize(tensors, "lm_head", weight, seed=3)

    edit_tensors(folder, edit)


def qwen_mixture(folder: Path, *, router: bool = False) -> None:
    """Make a Qwen3-MoE of it, with eight quantised experts, and a quantised router if requested."""
    inner = json.loads((folder / "config.json").read_text())["intermediate_size"]
    edit_json(
        folder / "config.json",
        lambda it: it.update(
            model_type="qwen3_moe",
            architectures=["Qwen3MoeForCausalLM"],
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=inner,
            norm_topk_prob=True,
            num_experts=ROUTED,
            num_experts_per_tok=2,
        ),
    )

    def edit(tensors: Tensors) -> None:
        for layer in range(2):
            attention = f"model.layers.{layer}.self_attn"
            size = tensors[f"{attention}.k_proj.qweight"].shape[1] // KV_HEADS
            for norm in ("q_norm", "k_norm"):
                tensors[f"{attention}.{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
            mlp = f"model.layers.{layer}.mlp"
            _route(tensors, mlp, mlp, quantized=router, seed=layer)
            for number, name in enumerate(("gate_proj", "down_proj", "up_proj"), 1):
                for expert in range(ROUTED):
                    seed = 10 * expert + number
                    weight = _random(tensors, f"{mlp}.{name}", seed)
                    _quantize(tensors, f"{mlp}.experts.{expert}.{name}", weight, seed=seed)
                _drop(tensors, f"{mlp}.{name}")

    edit_tensors(folder, edit)


def qwen_router(folder: Path) -> None:
    qwen_mixture(folder, router=True)


def mixtral_router(folder: Path) -> None:
    mixture(folder, experts=ROUTED, router=True)


def mixture(folder: Path, *, experts: int = 4, router: bool = False) -> None:
    """Make a Mixtral of it, with quantised experts in place of each MLP."""
    edit_json(
        folder / "config.json",
        lambda it: it.update(
            model_type="mixtral",
            architectures=["MixtralForCausalLM"],
            num_local_experts=experts,
            num_experts_per_tok=2,
        ),
    )

    def edit(tensors: Tensors) -> None:
        for layer in range(2):
            mlp, mixed = (f"model.layers.{layer}.{it}" for it in ("mlp", "block_sparse_moe"))
            _route(tensors, mlp, mixed, quantized=router, seed=layer, experts=experts)
            for number, name in enumerate(("gate_proj", "down_proj", "up_proj"), 1):
                for expert in range(experts):
                    weight = _random(tensors, f"{mlp}.{name}", 10 * expert + number)
                    prefix = f"{mixed}.experts.{expert}.w{number}"
                    _quantize(tensors, prefix, weight, seed=10 * expert + number)
                _drop(tensors, f"{mlp}.{name}")

    edit_tensors(folder, edit)


def _route(
    tensors: Tensors, mlp: str, mixed: str, *, quantized: bool, seed: int, experts: int = ROUTED
) -> None:
    """Add a mixture's router."""
    hidden = tensors[f"{mlp}.down_proj.qweight"].shape[1]
    weight = torch.randn(experts, hidden, generator=torch.Generator().manual_seed(seed))
    if quantized:
        _quantize(tensors, f"{mixed}.gate", weight, seed=seed)
    else:
        tensors[f"{mixed}.gate.weight"] = weight.to(torch.bfloat16)


def _random(tensors: Tensors, prefix: str, seed: int) -> torch.Tensor:
    """Make a weight, [N, K], of a layer's shape."""
    rows = tensors[f"{prefix}.qweight"].shape[0] * 32 // BITS
    columns = tensors[f"{prefix}.qweight"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, rows, generator=generator) / rows**0.5


def _quantize(tensors: Tensors, prefix: str, weight: torch.Tensor, *, seed: int) -> None:
    """Round a weight, [N, K], to 4 bits, in groups of rows in a random order."""
    rows, columns = weight.shape[1], weight.shape[0]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    g_idx = torch.empty(rows, dtype=torch.int32)
    g_idx[order] = (torch.arange(rows) // GROUP).to(torch.int32)
    grouped = weight.t()[order].reshape(-1, GROUP, columns)
    scales = (grouped.abs().amax(dim=1) / 7).half()
    codes = (weight.t() / scales.float()[g_idx.long()]).round().clamp(-8, 7) + 8
    zeros = np.full((scales.shape[0], columns), 7, dtype=np.uint8)  # 8, stored minus one
    _drop(tensors, prefix)
    tensors[f"{prefix}.qweight"] = torch.from_numpy(
        pack_rows(codes.to(torch.uint8).numpy(), BITS, "continuous")
    )
    tensors[f"{prefix}.qzeros"] = torch.from_numpy(pack_columns(zeros, BITS, "continuous"))
    tensors[f"{prefix}.scales"] = scales
    tensors[f"{prefix}.g_idx"] = g_idx


def _drop(tensors: Tensors, prefix: str) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"{prefix}.{part}", None)


ALTERED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "only quantize_config.json": (ACT_ORDER, only_quantize_config),
    "no config": (ACT_ORDER, without_config),
    "a legacy file name": (ACT_ORDER, legacy_name),
    "v2 labelled v1": (V2, labelled_v1),
    "no g_idx": (SEQUENTIAL, without_g_idx),
    "an order of rows for each": (ACT_ORDER, own_orders),
    "biases the model lacks": (ACT_ORDER, biased),
    "an MLP left as it was": (ACT_ORDER, partly_plain),
    "a quantised head": (ACT_ORDER, quantized_head),
    "a mixture of quantised experts": (ACT_ORDER, mixture),
    "a Qwen3-MoE": (ACT_ORDER, qwen_mixture),
    "a Qwen3-MoE with a quantised router": (ACT_ORDER, qwen_router),
    "a mixture with a quantised router": (ACT_ORDER, mixtral_router),
}
# Two workers share these too: a bias that one of them adds, experts, a cut vocabulary.
SHARED = ("biases the model lacks", "a quantised head", "a mixture of quantised experts")
# vLLM alone takes this one at its word, and answers wrong: taken without being asked.
LIES = {"act-order labelled in order": (ACT_ORDER, labelled_in_order)}
# Refused in words.
REFUSED = {"one of q, k and v left as it was": (ACT_ORDER, half_joined)}
ALTERED |= LIES | REFUSED
