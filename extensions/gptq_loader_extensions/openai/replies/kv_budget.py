"""Share out the memory for keys and values: how much running replies may take, and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.system.device_memory import free_device_memory

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["reserve_kv_cache"]

KV_SHARE = 0.6  # of the memory that is free once a model is loaded, for keys and values
CACHE_SHARE = 0.25  # of that, for sequences that a next turn may continue


def reserve_kv_cache(model: LoadedModel, max_num_seqs: int) -> int:
    """Have a model keep as many sequences as there is memory for.

    Args:
        model: a loaded model.
        max_num_seqs: how many replies are generated at a time.

    Returns:
        The bytes that the keys and values of running replies may take.
    """
    if model.engine is not None:
        model.keep(max_num_seqs)
        return model.engine.reserve(max_num_seqs)
    max_bytes = int(free_device_memory(model.model.device) * KV_SHARE)
    bytes_per_sequence = model.context * (model.plan.kv_bytes_per_token or 0)
    kept = max_bytes * CACHE_SHARE // max(1, bytes_per_sequence)
    model.keep(int(min(max(kept, 1), max_num_seqs)))
    return max_bytes
