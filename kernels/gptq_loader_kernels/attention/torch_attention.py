"""Write to and attend over a pool of blocks in plain torch operations, on any device.

What Triton's kernels are compared with, and what runs where Triton does not. No operation here
waits for the device, and no shape depends on a value: it can be captured in a graph.
"""

from __future__ import annotations

import torch

__all__ = ["CODE_LIMITS", "gather_cache", "paged_attention", "quantize", "required", "write_cache"]

CODE_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest code of each dtype
SMALLEST_SCALE = 2.0**-14  # float16's smallest normal number: below, its scales lose their digits


def quantize(
    values: torch.Tensor, dtype: torch.dtype, scales_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each head of each token to 8 bits with one scale.

    A value of an int8 cache is off by half a scale or less: by 1/254 of the largest of its head's
    values or less, with the scale's own rounding 1/253.

    Args:
        values: [..., D].
        dtype: int8 or float8_e4m3fn.
        scales_dtype: float16 or float32.

    Returns:
        Codes, `dtype` [..., D], and scales, `scales_dtype` [...].
    """
    values = values.float()
    limit = CODE_LIMITS[dtype]
    scales = (values.abs().amax(dim=-1) / limit).clamp(SMALLEST_SCALE, _largest(scales_dtype))
    scales = scales.to(scales_dtype)
    codes = values / scales.float()[..., None]
    if dtype == torch.int8:
        codes = codes.round()
    return codes.clamp(-limit, limit).to(dtype), scales


def write_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write keys [T, kv_heads, D] and values [T, kv_heads, Dv] to their slots, int64 [T]."""
    if slots.shape[0] == 0:
        return
    block_size = key_cache.shape[1]
    kept = slots >= 0
    # A padding row writes what the first row that is none writes, where it writes it.
    first = kept.int().argmax(dim=0, keepdim=True)
    rows = torch.where(kept, torch.arange(slots.shape[0], device=slots.device), first)
    slots = slots[rows].clamp(min=0)  # 0 where there are padding rows alone
    at = (slots // block_size, slots % block_size)
    any_kept = kept.any()
    for new, cache, scales in ((keys, key_cache, key_scales), (values, value_cache, value_scales)):
        written = new[rows]
        if cache.dtype in CODE_LIMITS:
            codes, new_scales = quantize(written, cache.dtype, required(scales).dtype)
            _put(required(scales), at, new_scales, any_kept)
            _put(cache, at, codes, any_kept)
        else:
            _put(cache, at, written.to(cache.dtype), any_kept)


def _put(
    cache: torch.Tensor,
    at: tuple[torch.Tensor, torch.Tensor],
    new: torch.Tensor,
    any_kept: torch.Tensor,
) -> None:
    if cache.dtype == torch.float8_e4m3fn:  # which few operations know
        cache, new = cache.view(torch.uint8), new.view(torch.uint8)
    cache.index_put_(at, torch.where(any_kept, new, cache[at]))


def gather_cache(
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    visible: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Gather sequences' positions from their blocks; zero where a position is not visible.

    Args:
        cache: [blocks, block_size, kv_heads, D].
        block_tables: int32 [S, max_blocks]; entries without a visible position are not used.
        visible: bool [S, max_blocks * block_size].
        scales: of a cache in 8 bits, [blocks, block_size, kv_heads].
        dtype: of what is returned.

    Returns:
        [S, max_blocks * block_size, kv_heads, D].
    """
    block_size = cache.shape[1]
    used = visible.unflatten(1, (-1, block_size)).any(dim=-1)
    blocks = torch.where(used, block_tables, 0).long()
    if cache.dtype == torch.float8_e4m3fn:  # which few operations know
        codes = cache.view(torch.uint8)[blocks].view(torch.float8_e4m3fn)
    else:
        codes = cache[blocks]
    gathered = codes.flatten(1, 2).to(dtype)
    if cache.dtype in CODE_LIMITS:
        gathered *= required(scales)[blocks].flatten(1, 2).to(dtype)[..., None]
    return gathered.masked_fill(~visible[..., None, None], 0)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from each sequence's last token to its positions; see `operators.py`."""
    sequences, heads, _ = query.shape
    block_size, kv_heads = key_cache.shape[1:3]
    size = block_tables.shape[1] * block_size
    if size == 0 or sequences == 0:
        return query.new_zeros(sequences, heads, value_cache.shape[3])
    dtype = torch.promote_types(query.dtype, torch.float32)
    positions = torch.arange(size, device=query.device)
    visible = positions < lengths[:, None]
    if window is not None:
        visible &= positions >= lengths[:, None] - window
    keys = gather_cache(key_cache, block_tables, visible, key_scales, dtype=dtype)
    values = gather_cache(value_cache, block_tables, visible, value_scales, dtype=dtype)
    grouped = query.to(dtype).unflatten(1, (kv_heads, -1))  # [S, kv_heads, G, D]
    scores = (grouped @ keys.permute(0, 2, 3, 1)) * scale  # [S, kv_heads, G, positions]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    highest = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    if sinks is not None:
        sinks = sinks.to(dtype).view(kv_heads, -1, 1)
        highest = torch.maximum(highest, sinks)
    weights = torch.exp(scores - highest)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - highest)
    attended = weights @ values.transpose(1, 2)  # [S, kv_heads, G, Dv]
    attended = attended / total.masked_fill(total == 0, 1)  # a padding row's is 0
    return attended.flatten(1, 2).to(query.dtype)


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def required(scales: torch.Tensor | None) -> torch.Tensor:
    """Return the scales of a cache in 8 bits, which must be there."""
    if scales is None:
        raise ValueError("a cache in 8 bits needs the tensors of its scales")
    return scales
