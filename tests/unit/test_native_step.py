"""The native decoding step against transformers' own forward, on small random models."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from native_codes import EXACT_CODES, Code
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_loader_kernels.cpu.library import Isa, choose_code, find_library, load_library
from gptq_loader_plugin.conformance.layers import Case, make_layer, roll_columns
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.generation.cache_layers import GrowableLayer
from gptq_loader_plugin.generation.generate import Generation, generate_pieces
from gptq_loader_plugin.generation.kv_cache import PrefixCache, make_cache
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.model.experts import PackedExperts, expert_weights, experts_layout

pytestmark = pytest.mark.skipif(find_library() is None, reason="the native library was not built")

SHAPE = {
    "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 2, "vocab_size": 300,
    "num_attention_heads": 4, "max_position_embeddings": 512, "head_dim": 32,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 48, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "num_key_value_heads": 4, "moe_intermediate_size": 96,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama-biased": {"num_key_value_heads": 4, "attention_bias": True, "model_type": "llama"},
    "llama-scaled": {
        "num_key_value_heads": 2, "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 1e4,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    # Heads that fill no whole vectors of bfloat16, and that AVX-512 adds up by one and a half.
    "mistral-48": {
        "num_key_value_heads": 2, "head_dim": 48, "sliding_window": 9, "model_type": "mistral",
    },
    "phi-80": {
        "num_key_value_heads": 4, "head_dim": 80, "hidden_act": "gelu_new", "pad_token_id": 0,
        "model_type": "phi", "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4,
        },
    },
    "qwen3-112": {"num_key_value_heads": 1, "head_dim": 112, "model_type": "qwen3"},
    "gemma2-16": {
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9,
        "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "model_type": "gemma2",
    },
    "gemma2": {
        "num_key_value_heads": 2, "sliding_window": 9, "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3": {
        "num_key_value_heads": 1, "sliding_window": 9, "query_pre_attn_scalar": 24,
        "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.5, "pad_token_id": 0},
    "cohere2": {
        "num_key_value_heads": 2, "sliding_window": 9, "pad_token_id": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {"num_attention_heads": 2, "attention_bias": True},
    "gpt_neox-in-turn": {
        "num_attention_heads": 1, "use_parallel_residual": False, "model_type": "gpt_neox",
        "hidden_act": "gelu_new",
    },
    "gpt_neox-96": {
        "hidden_size": 192, "num_attention_heads": 2, "attention_bias": True,
        "model_type": "gpt_neox",
    },
    "gpt_neox-80": {
        "hidden_size": 160, "num_attention_heads": 2, "use_parallel_residual": False,
        "model_type": "gpt_neox",
    },
    "phi": {"num_key_value_heads": 2, "hidden_act": "gelu_new", "pad_token_id": 0},
    "starcoder2": {"num_key_value_heads": 2, "sliding_window": 9, "use_bias": True},
    "glm": {
        "num_key_value_heads": 2, "intermediate_size": 192, "attention_bias": True,
        "pad_token_id": 0,
    },
    "seed_oss": {"num_key_value_heads": 2, "attention_bias": True, "pad_token_id": 0},
    "glm4": {
        "num_key_value_heads": 2, "intermediate_size": 192, "attention_bias": True,
        "pad_token_id": 0,
    },
    "glm4_moe": {
        "num_key_value_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 96, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "attention_bias": True,
        "use_qk_norm": True, "pad_token_id": 0, "num_hidden_layers": 3,
    },
    "glm4_moe-plain": {
        "num_key_value_heads": 2, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 96, "n_shared_experts": 1, "first_k_dense_replace": 0,
        "norm_topk_prob": False, "pad_token_id": 0, "model_type": "glm4_moe",
    },
    "deepseek_v2": {
        **LATENT, "num_experts_per_tok": 3, "n_routed_experts": 8, "topk_method": "greedy",
        "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
    },
    "deepseek_v2-groups": {
        **LATENT, "q_lora_rank": None, "num_experts_per_tok": 3, "n_routed_experts": 8,
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "mlp_bias": True,
        "n_shared_experts": 1, "first_k_dense_replace": 0, "model_type": "deepseek_v2",
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "deepseek_v2-wide": {  # as wide as the real ones
        **LATENT, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts_per_tok": 3,
        "n_routed_experts": 4, "num_hidden_layers": 1, "first_k_dense_replace": 1,
        "model_type": "deepseek_v2",
    },
    "deepseek_v3": {
        **LATENT, "num_experts_per_tok": 3, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "attention_bias": True,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek_v3-halves": {
        **LATENT, "q_lora_rank": None, "num_experts_per_tok": 2, "n_routed_experts": 6,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "rope_interleave": False,
        "norm_topk_prob": False, "rms_norm_eps": 1e-3, "model_type": "deepseek_v3",
    },
    # Latents that fill no whole vectors of AVX-512.
    "glm4_moe_lite": {
        **LATENT, "kv_lora_rank": 96, "qk_rope_head_dim": 16, "head_dim": 16, "pad_token_id": 0,
        "num_experts_per_tok": 3, "n_routed_experts": 6,
    },
    "youtu": {**LATENT, "v_head_dim": 48, "pad_token_id": 0},
    "dots1": {
        "num_key_value_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 96, "n_shared_experts": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "pad_token_id": 0, "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"], "norm_topk_prob": True,
    },
    "gpt_oss": {
        "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 3,
        "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 1.5, "pad_token_id": 0, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False,
            "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 128,
        },
    },
    "granite": {
        "num_key_value_heads": 2, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0, "logits_scaling": 2.0,
    },
    "olmo2": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "pad_token_id": 0},
    "stablelm": {"num_key_value_heads": 2, "use_qkv_bias": True},
    "stablelm-parallel": {
        "num_key_value_heads": 2, "use_parallel_residual": True, "model_type": "stablelm",
    },
    "mistral": {"num_key_value_heads": 2, "sliding_window": 9},
    "minimax_m2": {
        "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 3,
        "pad_token_id": 0, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        },
    },
    "olmoe": {"num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2},
    "mixtral": {
        "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2,
        "sliding_window": 9,
    },
    "qwen2_moe": {
        "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 3,
        "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160, "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_key_value_heads": 1, "num_experts": 7, "num_experts_per_tok": 3,
        "moe_intermediate_size": 96, "norm_topk_prob": True,
    },
    "phi3": {
        "num_key_value_heads": 2, "intermediate_size": 192, "sliding_window": 9, "pad_token_id": 0,
    },
    "phi3-partial": {
        "num_key_value_heads": 2, "intermediate_size": 192, "pad_token_id": 0,
        "model_type": "phi3", "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        },
    },
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 1},
}  # fmt: skip


def build(family: str, *, dtype: torch.dtype = torch.float32, bits: int | None = 4) -> Any:
    """Build a random model; with bits, its linears packed by the native kernel."""
    from gptq_loader_kernels.cpu import CpuKernel

    torch.manual_seed(0)
    fields = SHAPE | FAMILIES[family]
    config = AutoConfig.for_model(fields.pop("model_type", family), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(("bias", "sinks")):
            parameter.data = torch.randn(parameter.shape).mul(0.3).add(1).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.randn(buffer.shape).mul(0.05)  # what a file has in float32
    for name, fused in list(model.base_model.named_modules()):
        if experts_layout(fused) is not None:
            model.base_model.set_submodule(name, separate(fused))
    made = 0
    if bits is not None:
        for name, linear in list(model.base_model.named_modules()):
            if isinstance(linear, torch.nn.Linear) and linear.out_features > 1:
                case = Case(
                    bits=bits, group_size=32, rows=linear.in_features, columns=linear.out_features,
                    sym=False, bias=linear.bias is not None,
                )  # fmt: skip
                spec, *layer = make_layer(case)
                packed, _ = roll_columns(*layer, 3 * made)  # no two of them alike
                made += 1
                module = CpuKernel().prepare(spec, packed, find_device("cpu"))
                model.base_model.set_submodule(name, module)
    return model.requires_grad_(requires_grad=False)


def separate(fused: Any) -> PackedExperts:
    """Take fused experts apart; they are put in place in the order of their files' names."""
    layout = experts_layout(fused)
    assert layout is not None
    parts = list(expert_weights(fused, layout))
    experts = PackedExperts(fused)
    for expert, role, weight, bias in sorted(parts, key=lambda it: it[:2]):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        linear.bias = None if bias is None else torch.nn.Parameter(bias.clone())
        experts.place(expert, role, linear)
    return experts


def install(model: Any) -> Any:
    """Install the step and give it."""
    from gptq_loader_kernels.cpu.decoder import NativeDecoder
    from gptq_loader_kernels.cpu.install import install

    step = install(model)
    assert isinstance(step, NativeDecoder), step
    return step


@torch.inference_mode()
def by_steps(model: Any, ids: torch.Tensor, first: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """Read a prompt at once, then the rest in steps; give all logits after the prompt."""
    from gptq_loader_kernels.cpu.decoder import CACHE

    cache = {CACHE: make_cache(model), "use_cache": True}
    parts = [model(input_ids=part, **cache).logits for part in ids.split((first, *sizes), dim=1)]
    return torch.cat(parts[1:], dim=1)


@pytest.mark.parametrize("bits", [None, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_answers_as_transformers_does(family: str, bits: int | None) -> None:
    model = build(family, bits=bits)
    ids = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[:, 12:]
    step = install(model)
    before = step.steps
    got = by_steps(model, ids, 12, (1, 1, 2, 8, 5, 1))
    assert step.steps - before == 6
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_a_bfloat16_step_is_no_further_from_float32_than_transformers() -> None:
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = build("llama", bits=4)(input_ids=ids).logits[:, 12:]
        model = build("llama", bits=4, dtype=torch.bfloat16)
        plain = by_steps(model, ids, 12, (1,) * 12).float()
    install(model)
    got = by_steps(model, ids, 12, (1,) * 12).float()
    assert (got - exact).norm() < 1.2 * (plain - exact).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_installed_in_bfloat16(family: str) -> None:
    """Its own forward is asked in float32 too, which torch's norms take by weights of float32."""
    model = build(family, dtype=torch.bfloat16)
    kept = dict(model.named_parameters())
    assert not isinstance(install(model), str)
    now = dict(model.named_parameters())
    assert all(now[name] is it for name, it in kept.items() if not name.startswith("lm_head"))


def test_what_is_no_step_goes_to_transformers() -> None:
    model = build("llama")
    step = install(model)
    taken, ids = step.steps, torch.arange(5)[None]
    with torch.inference_mode():
        model(input_ids=ids)  # no cache
        model(input_ids=torch.arange(10).view(2, 5), use_cache=True)  # two sequences
        model(input_ids=ids, use_cache=True, output_hidden_states=True)
        mask = torch.tensor([[0, 1, 1, 1, 1]])
        model(input_ids=ids, use_cache=True, attention_mask=mask)
    assert step.steps == taken


def test_a_changed_model_is_seen() -> None:
    model = build("llama")
    step = install(model)
    ids = torch.arange(20)[None]
    other = build("llama", bits=None).model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = other
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[:, 12:]
    taken = step.steps
    torch.testing.assert_close(by_steps(model, ids, 12, (1,) * 8), expected, rtol=2e-4, atol=2e-4)
    assert step.steps == taken + 8
    copied = copy.deepcopy(model)
    torch.testing.assert_close(by_steps(copied, ids, 12, (1,) * 8), expected, rtol=2e-4, atol=2e-4)
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(model.model.layers[1].mlp.down_proj)
    taken = step.steps
    torch.testing.assert_close(by_steps(model, ids, 12, (1,) * 8), expected, rtol=2e-4, atol=2e-4)
    assert step.steps == taken  # transformers' way: a part is none the library knows


def test_whatever_is_changed_later_is_seen() -> None:
    model = build("llama")
    step = install(model)
    ids = torch.arange(20)[None]
    by_steps(model, ids, 12, (1,) * 8)
    layers = model.model.layers
    seen: list[int] = []
    hook = layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    taken = step.steps
    by_steps(model, ids, 12, (1,) * 8)
    hook.remove()
    assert (step.steps, len(seen)) == (taken, 9)

    def changes_are_followed() -> None:
        with torch.inference_mode():
            expected = model(input_ids=ids).logits[:, 12:]
        got = by_steps(model, ids, 12, (1,) * 8)
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)

    layers[0].input_layernorm.weight = torch.nn.Parameter(torch.rand(128), requires_grad=False)
    changes_are_followed()
    layers[1].self_attn.o_proj.words = torch.flip(layers[1].self_attn.o_proj.words, (0,))
    changes_are_followed()
    layers[0] = build("llama", bits=3).model.layers[1]
    layers[0].self_attn.layer_idx = 0
    changes_are_followed()
    assert step.steps == taken + 24


def test_two_replies_at_a_time_do_not_mix() -> None:
    model = build("llama")
    install(model)
    prompts = [
        torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    alone = [by_steps(model, ids, 10, (1,) * 50) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ids: by_steps(model, ids, 10, (1,) * 50), prompts * 4))
    for got, expected in zip(together, alone * 4, strict=True):
        torch.testing.assert_close(got, expected)


def change_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change what transformers computes, where no look at the model shows it."""
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * 1.02)


def test_a_step_that_differs_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_loader_kernels.cpu import install as _native_install

    model = build("llama", bits=None)
    change_class(model, monkeypatch)
    plain, head = model.model.forward, model.lm_head
    reason = _native_install.install(model)
    assert reason is not None
    assert "differ" in reason
    assert model.model.forward == plain
    assert model.lm_head is head


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_transformers_generate_takes_steps_and_answers_the_same(family: str) -> None:
    model = build(family)
    ids = torch.arange(3, 23)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    step = install(model)
    taken = step.steps
    assert torch.equal(model.generate(ids, **options), expected)
    assert step.steps == taken + 11


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens: list[int], **_: object) -> str:
        """Join the letters."""
        return "".join(chr(97 + it % 26) for it in tokens)


def test_a_turn_reads_only_what_is_new() -> None:
    model = build("llama")
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    kept = PrefixCache()

    def reply(ids: list[int]) -> str:
        read.clear()
        pieces = generate_pieces(
            lambda: Generation(
                model, Letters(), ids, GenerateOptions(temperature=0), max_new_tokens=4, stop=(),  # type: ignore[arg-type]
                stop_ids=frozenset(), kept=kept,
            )
        )  # fmt: skip
        return "".join(it.text for it in pieces)

    first = list(range(40))
    reply(first)
    assert read == [40, 1, 1, 1]
    again = [*first, 7, 8, 9]
    answer = reply(again)
    assert read == [3, 1, 1, 1]
    kept.clear()
    assert reply(again) == answer
    assert read[0] == 43
    reply(first[:20])  # shorter: all of it is held, and its last token is read for its logits
    assert read[0] == 1


def test_a_cache_grows_and_is_cut_short() -> None:
    layer = GrowableLayer()
    keys = torch.randn(1, 2, 700, 8)
    for part in keys.split(90, dim=2):
        all_keys, all_values = layer.update(part, -part)
    assert torch.equal(all_keys, keys)
    assert torch.equal(all_values, -keys)
    layer.crop(-100)
    assert layer.get_seq_length() == 600
    assert layer.keys is not None
    assert torch.equal(layer.keys, keys[:, :, :600])
    layer.reset()
    assert layer.get_seq_length() == 0


def test_a_step_in_bfloat16_that_differs_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_loader_kernels.cpu import install as _native_install

    model = build("llama", dtype=torch.bfloat16)
    change_class(model, monkeypatch)  # by less than what rounding may do
    reason = _native_install.install(model)
    assert reason is not None
    assert "float32" in reason


@pytest.mark.parametrize("threads", [2, 5, 16])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "qwen3",
        "gemma2",
        "qwen2_moe",
        "gpt_oss",
        "dots1",
        "deepseek_v2",
        "deepseek_v3-halves",
    ],
)
def test_threads_share_the_positions_of_a_head(family: str, threads: int) -> None:
    model = build(family)
    ids = torch.randint(0, 300, (1, 400), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[:, 350:]
    install(model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = by_steps(model, ids, 350, (1, 8, 1, 3, 1, 8, 7, 8, 8, 5))
        short = by_steps(model, ids[:, :8], 1, (1, 1, 5))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(
        short, by_steps(model, ids[:, :8], 1, (1, 1, 5)), rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code", EXACT_CODES)
@pytest.mark.parametrize(
    "family",
    [
        "mistral",
        "gpt_oss",
        "mistral-48",
        "phi-80",
        "qwen3-112",
        "gpt_neox-80",
        "deepseek_v2-wide",
        "deepseek_v3",
        "glm4_moe_lite",
    ],
)
def test_the_code_for_every_processor_answers_alike(
    family: str, code: Code, dtype: torch.dtype
) -> None:
    from gptq_loader_kernels.cpu.decoder import NativeDecoder

    isa, activations = code
    ids = torch.randint(0, 300, (1, 200), generator=torch.Generator().manual_seed(1))
    sizes = (1, 8, 1, 4, 1, 3, 2)
    with torch.inference_mode():
        exact = build(family)(input_ids=ids).logits[:, 180:]
        model = build(family, dtype=dtype)
        plain = by_steps(model, ids, 180, sizes).float()
    step = NativeDecoder(model.base_model, isa=isa, activations=activations)
    model.base_model.forward = step.forward
    got = by_steps(model, ids, 180, sizes).float()
    assert step.steps == len(sizes)
    if dtype == torch.float32:
        torch.testing.assert_close(got, exact, rtol=2e-4, atol=2e-4)
    else:
        assert (got - exact).norm() < 1.2 * (plain - exact).norm()


@torch.inference_mode()
def test_a_forward_put_in_its_place_sees_every_call() -> None:
    model = build("llama")
    step = install(model)
    seen, own = [], model.model.forward
    assert step.step_many([[5]], [make_cache(model.model)]) is not None
    hook = model.model.register_forward_hook(lambda *_: None)
    assert step.step_many([[5]], [make_cache(model.model)]) is None
    hook.remove()

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape)
        return own(*args, **kwargs)

    model.model.forward = watched
    assert step.step_many([[5]], [make_cache(model.model)]) is None
    model(input_ids=torch.tensor([[5]]))
    assert seen == [(1, 1)]


@pytest.mark.parametrize("code", EXACT_CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen3", "gemma3", "qwen2_moe", "gpt_oss", "phi-80", "deepseek_v3"],
)
def test_sequences_step_together_as_they_do_alone(
    family: str, dtype: torch.dtype, code: Code
) -> None:
    for bits in (3, 4):
        together, alone = step_together_and_alone(family, dtype, code, bits, threads=1)
        for got, expected in zip(together, alone, strict=True):
            assert torch.equal(got, expected), f"{bits} bits: a token's numbers are its own"


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_threads_step_sequences_together(family: str, dtype: torch.dtype, threads: int) -> None:
    together, alone = step_together_and_alone(family, dtype, choose_code(), 3, threads)
    for got, expected in zip(together, alone, strict=True):
        assert torch.equal(got, expected)


# Segments of positions begin at 128, at 1,024 and at 1,280; a mistral's window begins in one.
@pytest.mark.parametrize("code", EXACT_CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "first"),
    [
        ("llama", 120),
        ("mistral", 1018),
        ("gemma2", 1270),
        ("qwen2_moe", 9),
        ("gpt_oss", 120),
        ("phi-80", 120),
        ("glm4_moe_lite", 120),
    ],
)
def test_a_token_is_the_same_in_every_step(
    family: str, dtype: torch.dtype, code: Code, first: int
) -> None:
    """To the last bit: beside the tokens after it, and by any number of threads."""
    from gptq_loader_kernels.cpu.decoder import NativeDecoder

    model = build(family, dtype=dtype)
    step = NativeDecoder(model.model, isa=code[0], activations=code[1])
    model.model.forward = step.forward
    ids = torch.randint(0, 300, (1, first + 20), generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    found = []
    try:
        for threads, sizes in ((1, (1,) * 20), (1, (5, 3, 5, 2, 5)), (2, (4, 5, 1, 5, 5))):
            torch.set_num_threads(1)
            cache, taken = make_cache(model), step.steps
            with torch.inference_mode():
                model.model(input_ids=ids[:, :first], use_cache=True, cache=cache)
                torch.set_num_threads(threads)
                parts = [it.tolist() for it in ids[0, first:].split(sizes)]
                found.append(torch.cat([step.step_many([it], [cache]) for it in parts]))
            assert step.steps > taken
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def step_together_and_alone(
    family: str, dtype: torch.dtype, code: Code, bits: int, threads: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Step nine sequences four times in one call, and each by itself: both ways' states."""
    from gptq_loader_kernels.cpu.decoder import NativeDecoder

    model = build(family, dtype=dtype, bits=bits)
    step = NativeDecoder(model.model, isa=code[0], activations=code[1])
    model.model.forward = step.forward
    draw = torch.Generator().manual_seed(2)
    lengths = (3, 40, 1, 130, 17, 64, 9, 250, 5)
    prompts = [torch.randint(0, 300, (1, it), generator=draw) for it in lengths]
    steps = [[[7 * i + j] * (1 + (i + j) % 3) for i in range(len(lengths))] for j in range(4)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            alone: list[list[Any]] = [[] for _ in steps]
            for i, prompt in enumerate(prompts):
                cache = make_cache(model)
                model.model(input_ids=prompt, use_cache=True, cache=cache)
                for j, tokens in enumerate(steps):
                    alone[j].append(step.step_many([tokens[i]], [cache]))
            caches = [make_cache(model) for _ in prompts]
            for prompt, cache in zip(prompts, caches, strict=True):
                model.model(input_ids=prompt, use_cache=True, cache=cache)
            together: list[Any] = [step.step_many(tokens, caches) for tokens in steps]
    finally:
        torch.set_num_threads(before)
    assert [it.get_seq_length() for it in caches] == [
        length + sum(len(tokens[i]) for tokens in steps) for i, length in enumerate(lengths)
    ]
    return together, [torch.cat(states) for states in alone]


@pytest.mark.skipif(load_library().gptq_isa() < Isa.AVX512_BF16, reason="no bfloat16 products here")
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(
    "family", [name for name, it in FAMILIES.items() if "kv_lora_rank" not in it]
)
def test_a_native_prompt_is_no_further_from_float32_than_transformers(
    family: str, amx: bool
) -> None:
    from gptq_loader_kernels.cpu.decoder import NativeDecoder

    if amx and not load_library().gptq_amx():
        pytest.skip("this processor has no matrix unit")
    ids = torch.randint(0, 300, (1, 480), generator=torch.Generator().manual_seed(1))
    sizes = (9, 33, 16, 70, 1, 129, 31, 150, 41)  # prompts after prompts, one step among them
    with torch.inference_mode():
        exact = build(family, bits=3)(input_ids=ids).logits[:, 9:]
        model = build(family, bits=3, dtype=torch.bfloat16)
        plain = by_steps(model, ids, sizes[0], sizes[1:]).float()
    step = NativeDecoder(model.base_model, amx=amx)
    model.base_model.forward = step.forward
    got = by_steps(model, ids, sizes[0], sizes[1:]).float()
    assert (step.prompts, step.steps) == (len(sizes) - 1, 1)
    error, theirs = (got - exact).norm(dim=-1), (plain - exact).norm(dim=-1)
    if step.family.expert_size is not None:  # rounding sends some tokens to other experts
        sent = (error > 5 * error.median()) | (theirs > 5 * theirs.median())
        assert sent.float().mean() < 0.08
        error, theirs = error[~sent], theirs[~sent]
    assert error.norm() < 1.1 * theirs.norm()
    assert error.max() < 2 * theirs.max()  # no single token is wrong


@pytest.mark.skipif(load_library().gptq_isa() < Isa.AVX512_BF16, reason="no bfloat16 products here")
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe"])
def test_a_prompt_longer_than_what_is_multiplied_at_once(family: str, threads: int) -> None:
    model = build(family, dtype=torch.bfloat16)
    ids = torch.randint(0, 300, (1, 1100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = build(family)(input_ids=ids).logits
        plain = model(input_ids=ids).logits.float()
    step = install(model)
    taken, before = step.prompts, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            got = model(input_ids=ids, use_cache=True).logits.float()
    finally:
        torch.set_num_threads(before)
    assert step.prompts == taken + 1
    error = (got - exact).norm(dim=-1)
    assert error.norm() < 1.1 * (plain - exact).norm()
    assert error.max() < 2 * (plain - exact).norm(dim=-1).max()


def test_what_is_no_native_prompt_goes_to_transformers() -> None:
    ids = torch.arange(20)[None]
    for model in (build("llama"), build("llama", bits=None, dtype=torch.bfloat16)):
        step = install(model)  # float32; layers that are not packed
        taken = step.prompts
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True)
        assert step.prompts == taken


def test_guessed_tokens_are_stepped_and_change_nothing() -> None:
    model, assistant = build("llama"), build("llama", bits=3)
    install(assistant)
    ids = torch.arange(3, 12).repeat(3)[None]
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    step = install(model)
    for more in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        taken = step.steps
        assert torch.equal(model.generate(ids, **options, **more), expected)
        assert step.steps > taken


def test_a_float16_model_says_why_it_does_not_step() -> None:
    from gptq_loader_kernels.cpu import install as _native_install

    reason = _native_install.install(build("llama", dtype=torch.float16))
    assert reason == "it is in torch.float16; the step takes bfloat16 and float32"
