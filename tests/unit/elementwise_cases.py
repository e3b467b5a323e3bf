"""Norms, rotary embeddings and activations as transformers' modules compute them, to compare with.

As a program it checks them all as the environment has it: with TRITON_INTERPRET=1, the kernels.
"""

from __future__ import annotations

import itertools
import os

import torch
from transformers.activations import ACT2FN
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from gptq_loader_kernels.attention import (
    activation_and_mul,
    add_rms_norm,
    rms_norm,
    rotary_and_cache,
    write_cache,
)
from gptq_loader_kernels.attention.torch_attention import quantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMS = {
    "llama": (modeling_llama.LlamaRMSNorm, Qwen3RMSNorm),
    "gemma": (Gemma3RMSNorm,),
    "gpt_oss": (modeling_gpt_oss.GptOssRMSNorm,),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 1e-6
ROTARY = {  # how a family rotates, its share of a head, and whether neighbours are pairs
    "llama": (modeling_llama.apply_rotary_pos_emb, 1.0, False),
    "gpt_neox": (modeling_gpt_neox.apply_rotary_pos_emb, 0.25, False),
    "gpt_oss": (modeling_gpt_oss.apply_rotary_pos_emb, 1.0, False),
    "glm": (modeling_glm.apply_rotary_pos_emb, 0.5, True),
    "cohere": (modeling_cohere.apply_rotary_pos_emb, 1.0, True),
}


def same(result: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same to the last bit in torch; by the kernels, whose sums have another order, nearly."""
    assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
    if not INTERPRETED:
        assert torch.equal(result, wanted)
        return
    # the interpreter cuts float32 off where a GPU rounds it to bfloat16
    step = torch.finfo(wanted.dtype).eps * (2 if wanted.dtype == torch.float16 else 8)
    torch.testing.assert_close(result, wanted, rtol=step, atol=step)
    if wanted.dtype == torch.float16:
        assert (result != wanted).float().mean() < 0.05


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(style: str, size: int, dtype: torch.dtype, seed: int) -> list[torch.nn.Module]:
    modules = [it(size, eps=EPS) for it in NORMS[style]]
    for module in modules:
        module.weight.data = randn(size, dtype=dtype, seed=seed)
    return modules


@torch.no_grad()
def check_norms(style: str, dtype: torch.dtype, size: int) -> None:
    x, residual = (randn(5, size, dtype=dtype, seed=it) * 3 for it in (1, 2))
    for module, post in zip(norm(style, size, dtype, 3), norm(style, size, dtype, 4), strict=True):
        weights = module.weight.data, post.weight.data
        same(rms_norm(x, weights[0], EPS, style=style), module(x))
        joined = randn(5, size + 8, dtype=dtype, seed=5)[:, :size]  # part of a wider tensor
        same(rms_norm(joined, weights[0], EPS, style=style), module(joined))
        heads = x[:, : size // 8 * 8].reshape(5, -1, 8)
        few = norm(style, 8, dtype, 6)[0]
        same(rms_norm(heads, few.weight.data, EPS, style=style), few(heads))
        normed, total = add_rms_norm(x, residual, weights[0], EPS, style=style)
        same(total, residual + x)
        same(normed, module(total))
        normed, total = add_rms_norm(
            x, residual, weights[0], EPS, style=style, post_weight=weights[1]
        )
        same(total, residual + post(x))
        same(normed, module(total))


@torch.no_grad()
def check_rotary(
    family: str, dtype: torch.dtype, *, dim: int = 64, norms: bool = False, eight: bool = False
) -> None:
    function, share, interleaved = ROTARY[family]
    tokens, heads, kv_heads, value_dim = 4, 6, 2, 32
    joined = randn(tokens, (heads + kv_heads) * dim + kv_heads * value_dim, dtype=dtype, seed=1)
    query, keys, values = joined.split([heads * dim, kv_heads * dim, kv_heads * value_dim], dim=-1)
    query, keys = query.view(tokens, heads, dim), keys.view(tokens, kv_heads, dim)
    values = values.view(tokens, kv_heads, value_dim)
    size = int(dim * share)
    angles = torch.tensor([0.0, 1.0, 7.0, 4000.0])[:, None] / (
        10000.0 ** (torch.arange(0, size, 2) / size)
    )
    if family == "cohere":
        angles = angles.repeat_interleave(2, dim=-1)
    elif family != "gpt_oss":
        angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if family == "cohere":
        halves = cos[:, ::2].float(), sin[:, ::2].float()
    else:
        halves = cos[:, : size // 2], sin[:, : size // 2]
    query_norm, key_norm = norm("gemma", dim, dtype, 7)[0], norm("gemma", dim, dtype, 8)[0]
    normed = (query_norm(query), key_norm(keys)) if norms else (query, keys)
    wanted, wanted_keys = function(normed[0], normed[1], cos, sin, unsqueeze_dim=1)
    cache_dtype = torch.int8 if eight else dtype
    caches = [torch.zeros(3, 8, kv_heads, it).to(cache_dtype) for it in (dim, value_dim)]
    scales = [torch.zeros(3, 8, kv_heads, dtype=torch.float16) for _ in range(2)]
    slots = torch.tensor([9, -1, 0, 23])
    result = rotary_and_cache(
        query, keys, values, *halves, *caches, slots, interleaved=interleaved, eps=EPS,
        query_weight=query_norm.weight.data if norms else None,
        key_weight=key_norm.weight.data if norms else None, style="gemma",
        key_scales=scales[0] if eight else None, value_scales=scales[1] if eight else None,
    )  # fmt: skip
    same(result, wanted)
    assert result.is_contiguous()
    kept = slots >= 0
    for cache, scale, new in zip(caches, scales, (wanted_keys, values), strict=True):
        held = cache.flatten(0, 1)
        if eight:
            codes, new_scales = quantize(new[kept], torch.int8, torch.float16)
            held_scales = scale.flatten(0, 1)[slots[kept]]
            off = (held[slots[kept]].int() - codes.int()).abs().max()
            if INTERPRETED:
                torch.testing.assert_close(held_scales, new_scales, rtol=0.01, atol=0)
                assert off <= 2
            else:
                assert torch.equal(held_scales, new_scales)
                assert off == 0
        else:
            same(held[slots[kept]], new[kept])
        rest = torch.ones(24, dtype=torch.bool).index_fill(0, slots[kept], value=False)
        assert not held[rest].any()


@torch.no_grad()
def check_writes(dtype: torch.dtype, cache_dtype: torch.dtype, scales_dtype: torch.dtype) -> None:
    """What write_cache writes in 8 bits is the same to the last bit by the kernel."""
    keys, values = randn(6, 2, 80, dtype=dtype) * 20, randn(6, 2, 48, dtype=dtype, seed=1) * 1e-4
    caches = [torch.zeros(2, 4, 2, it).to(cache_dtype) for it in (80, 48)]
    scales = [torch.zeros(2, 4, 2, dtype=scales_dtype) for _ in range(2)]
    slots = torch.tensor([1, 7, -1, 2, 3, 4])
    write_cache(keys, values, *caches, slots, key_scales=scales[0], value_scales=scales[1])
    kept = slots >= 0
    for cache, scale, new in zip(caches, scales, (keys, values), strict=True):
        codes, new_scales = quantize(new[kept], cache_dtype, scales_dtype)
        held = cache.view(torch.uint8).flatten(0, 1)[slots[kept]].view(cache_dtype).float()
        if cache_dtype == torch.int8 or not INTERPRETED:  # which loses carries to float8
            assert torch.equal(held, codes.float())
        assert torch.equal(scale.flatten(0, 1)[slots[kept]], new_scales)


@torch.no_grad()
def check_activations(activation: str, dtype: torch.dtype, size: int) -> None:
    joined = randn(3, 2 * size, dtype=dtype) * 4
    gate, up = joined.chunk(2, dim=-1)
    same(activation_and_mul(joined, activation=activation), ACT2FN[activation](gate) * up)
    wanted = activation_and_mul(joined, activation=activation)
    assert torch.equal(activation_and_mul(joined[:, None], activation=activation)[:, 0], wanted)


ALL = [
    *((check_norms, *it) for it in itertools.product(NORMS, DTYPES, (64, 1000))),
    *((check_rotary, *it) for it in itertools.product(ROTARY, DTYPES)),
    *((check_activations, *it) for it in
      itertools.product(("silu", "gelu_pytorch_tanh"), DTYPES, (16, 1500))),
    *((check_writes, torch.float16, *it) for it in
      itertools.product((torch.int8, torch.float8_e4m3fn), (torch.float16, torch.float32))),
]  # fmt: skip
NORMED = [(family, dtype) for family in ("llama", "glm") for dtype in DTYPES]


def main() -> None:
    for check, *arguments in ALL:
        check(*arguments)
    for family, dtype in NORMED:
        check_rotary(family, dtype, dim=96, norms=True)
        check_rotary(family, dtype, eight=True)
    print(len(ALL) + len(NORMED))  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main()
