"""Caches of a decoder that the native library writes; imports torch."""

from __future__ import annotations

import weakref
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from gptq_loader_kernels.cpu.library import KvCache
from gptq_loader_plugin.generation.kv_cache import GrowableLayer

if TYPE_CHECKING:
    import ctypes

    from gptq_loader_kernels.cpu.library import Model

__all__ = ["HeldCaches", "is_growable", "make_growable"]


class HeldCaches:
    """Where each cache's keys and values lie: looked up again only when they have moved."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[list[torch.Tensor], Any]] = (
            weakref.WeakKeyDictionary()
        )

    def reserve(
        self,
        cache: Any,  # noqa: ANN401 - transformers' caches
        end: int,
        model: Model,
        dtype: torch.dtype,
    ) -> ctypes.Array[KvCache]:
        """Make room for positions up to `end` in each layer of a cache, and say where it is."""
        known = self._known.get(cache)
        like = torch.empty(1, model.kv_heads, 0, model.head_dim, dtype=dtype, device="cpu")
        if known is None:
            for layer in cache.layers:
                if not layer.is_initialized:
                    layer.lazy_initialization(like, like)
        rooms: list[torch.Tensor] = [layer.reserve(end, like) for layer in cache.layers]
        if known is not None and all(map(is_, rooms, known[0])):
            places: ctypes.Array[KvCache] = known[1]
            return places
        places = (KvCache * len(rooms))()
        for place, room in zip(places, rooms, strict=True):
            place.capacity = room.shape[3]
            place.keys = room.data_ptr()
            place.values = room.data_ptr() + room.stride(0) * room.element_size()
        self._known[cache] = rooms, places
        return places


def is_growable(cache: Any, model: Model, dtype: torch.dtype) -> bool:  # noqa: ANN401 - transformers' caches
    """Return whether a cache is one the step writes: of this model, and of one sequence."""
    if type(cache) is not DynamicCache or len(cache.layers) != model.layers:
        return False
    length = getattr(cache.layers[0], "length", 0)
    for layer in cache.layers:
        if type(layer) is not GrowableLayer or layer.length != length:
            return False
        room: torch.Tensor | None = layer.room
        if room is None:
            continue
        capacity = room.shape[3] if room.dim() == 5 else -1
        shape = (2, 1, model.kv_heads, capacity, model.head_dim)
        if room.shape != shape or room.dtype != dtype or capacity < length:
            return False
        if room.device.type != "cpu" or not room.is_contiguous():
            return False
    return True


def make_growable(cache: Any) -> None:  # noqa: ANN401
    """Give transformers' own layers room: plain ones, and sliding ones that are empty."""
    if type(cache) is not DynamicCache:
        return
    for layer in cache.layers:
        empty = type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized
        if type(layer) is DynamicLayer or empty:
            _make_growable(layer)


def _make_growable(layer: Any) -> None:  # noqa: ANN401 - a DynamicLayer
    """Turn transformers' own layer of a cache into one with room, keeping what it holds."""
    keys, values = layer.__dict__.pop("keys", None), layer.__dict__.pop("values", None)
    layer.__class__ = GrowableLayer
    if keys is not None and keys.numel():
        layer.room = torch.stack((keys, values))
        layer.length = keys.shape[-2]
