"""Launch the Triton kernels; imports triton. What each computes is said in `operators.py`."""

from __future__ import annotations

from typing import Any

import torch
from triton import JITFunction

from gptq_loader_kernels.attention import decode
from gptq_loader_kernels.attention.tiles import CHUNK, MAX_SPLITS, power_of_two, splits, tile_of
from gptq_loader_kernels.attention.torch_attention import CODE_LIMITS

__all__ = ["paged_attention"]

INTERPRETED_MULTIPROCESSORS = 4  # enough that short sequences are split
NO_WINDOW = 1 << 30
CORES = (8, 0)  # the first capability whose tensor cores Triton uses
MATRIX_ARCHITECTURES = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # AMD's, with as much


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> torch.Tensor:
    """Attend from one token of each sequence to its positions in the caches."""
    sequences, heads, dim = query.shape
    block_size, kv_heads, value_dim = value_cache.shape[1:]
    out = query.new_empty(sequences, heads, value_dim)
    if sequences == 0 or block_tables.shape[1] == 0:
        return out.zero_()
    group = heads // kv_heads
    eight = key_cache.dtype in CODE_LIMITS
    same = query.dtype == key_cache.dtype or eight
    cores = same and query.dtype != torch.float32 and _has_cores(query.device)
    tile = tile_of(group, max(dim, value_dim), cores=cores, amd=torch.version.hip is not None)
    parts = splits(kv_heads, block_tables.shape[1] * block_size, _multiprocessors(query.device))
    partial = stats = out
    if parts > 1:
        shape = (sequences, heads, parts)
        partial = torch.empty(*shape, value_dim, dtype=torch.float32, device=query.device)
        stats = torch.empty(*shape, 2, dtype=torch.float32, device=query.device)
    attend: Any = decode.attend_by_cores if tile.cores else decode.attend_by_lanes
    combine: Any = decode.combine
    programs = kv_heads * -(-group // tile.rows)
    with torch.cuda.device_of(query):
        attend[(parts, programs, sequences)](
            query,
            key_cache,
            value_cache,
            key_scales,
            value_scales,
            block_tables,
            lengths,
            sinks,
            partial,
            stats,
            out,
            scale,
            NO_WINDOW if window is None else window,
            1.0 if softcap is None else softcap,
            block_tables.stride(0),
            *query.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            *((0, 0) if key_scales is None else key_scales.stride()[:2]),
            GROUP=group,
            D=dim,
            DV=value_dim,
            D_PAD=power_of_two(dim),
            DV_PAD=power_of_two(value_dim),
            BLOCK_SIZE=block_size,
            SPLITS=parts,
            CHUNK=CHUNK,
            ROWS=tile.rows,
            POSITIONS=tile.positions,
            STAGES=tile.stages,
            EIGHT=eight,
            SOFTCAP=softcap is not None,
            SINKS=sinks is not None,
            INTERPRETED=not isinstance(attend, JITFunction),
            PACKED=query.device.type == "cuda" and torch.version.hip is None,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        if parts > 1:
            combine[(sequences, heads)](
                partial,
                stats,
                out,
                lengths,
                NO_WINDOW if window is None else window,
                DV=value_dim,
                DV_PAD=power_of_two(value_dim),
                SPLITS=parts,
                MAX_SPLITS=MAX_SPLITS,
                CHUNK=CHUNK,
                POSITIONS=tile.positions,
                enable_fp_fusion=True,
            )
    return out


def _has_cores(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.startswith(MATRIX_ARCHITECTURES)
    return torch.cuda.get_device_capability(device) >= CORES


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
