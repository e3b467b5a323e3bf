"""Caches of a decoder that the native library writes; imports torch."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from gptq_loader_kernels.cpu.library import KvCache
from gptq_loader_plugin.generation.cache_layers import GrowableLayer, Int8Layer, LatentLayer

if TYPE_CHECKING:
    import ctypes

    from gptq_loader_kernels.cpu.library import Model

__all__ = ["HeldCaches", "is_growable", "make_growable"]

_length, _room = attrgetter("length"), attrgetter("room")


@dataclass(frozen=True, slots=True)
class _Held:
    """Where a cache lies.

    Attributes:
        model: whose cache it is.
        layers: its layers, GrowableLayer.
        rooms: of each layer.
        capacity: positions for which every layer has room.
        places: the same for the library.
    """

    model: Model
    layers: list[Any]
    rooms: list[torch.Tensor]
    capacity: int
    places: ctypes.Array[KvCache]


class HeldCaches:
    """Where each cache's keys and values lie: looked up again only when they have moved."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, _Held] = weakref.WeakKeyDictionary()

    def _still(self, cache: Any) -> _Held | None:  # noqa: ANN401
        """Return where a cache lies, if that is where it was."""
        known = self._known.get(cache)
        if known is None or len(cache.layers) != len(known.layers):
            return None
        same = all(map(is_, cache.layers, known.layers))
        return known if same and all(map(is_, map(_room, known.layers), known.rooms)) else None

    def knows(self, cache: Any, model: Model) -> bool:  # noqa: ANN401 - transformers' caches
        """Return whether a cache is as it was left: one that `is_growable`, of this model."""
        known = self._still(cache)
        same = known is not None and known.model is model
        return same and len(set(map(_length, cache.layers))) == 1

    def reserve(
        self,
        cache: Any,  # noqa: ANN401 - transformers' caches
        end: int,
        model: Model,
        dtype: torch.dtype,
    ) -> ctypes.Array[KvCache]:
        """Make room for positions up to `end` in each layer of a cache, and say where it is."""
        known = self._still(cache)
        if known is not None and end <= known.capacity:
            return known.places
        like = torch.empty(1, model.kv_heads, 0, model.head_dim, dtype=dtype, device="cpu")
        keys = like[..., : model.latent_dim or None]
        for layer in cache.layers:
            if not layer.is_initialized:
                layer.lazy_initialization(keys, like[..., model.latent_dim :])
        rooms: list[torch.Tensor] = [layer.reserve(end, like) for layer in cache.layers]
        places = (KvCache * len(rooms))()
        for place, layer, room in zip(places, cache.layers, rooms, strict=True):
            if isinstance(layer, Int8Layer):
                scales = layer.scales
                assert scales is not None
                place.key_scales, place.value_scales = scales[0].data_ptr(), scales[1].data_ptr()
            place.capacity = room.shape[3]
            place.keys = room.data_ptr()
            if not model.latent_dim:
                place.values = room[1].data_ptr()
        capacity = min(room.shape[3] for room in rooms)
        self._known[cache] = _Held(model, list(cache.layers), rooms, capacity, places)
        return places


def is_growable(cache: Any, model: Model, dtype: torch.dtype) -> bool:  # noqa: ANN401 - transformers' caches
    """Return whether a cache is one the step writes: of this model, and of one sequence."""
    if type(cache) is not DynamicCache or len(cache.layers) != model.layers:
        return False
    layers: list[Any] = cache.layers
    length = getattr(layers[0], "length", 0)
    kinds = (LatentLayer,) if model.latent_dim else (GrowableLayer, Int8Layer)
    for layer in layers:
        if type(layer) not in kinds or layer.length != length:
            return False
        room: torch.Tensor | None = layer.room
        if room is None:
            continue
        capacity = room.shape[3] if room.dim() == 5 else -1
        shape = (layer.rooms, 1, model.kv_heads, capacity, model.head_dim)
        if type(layer) is LatentLayer and layer.key_size != model.latent_dim:
            return False
        kept = torch.int8 if type(layer) is Int8Layer else dtype
        if room.shape != shape or room.dtype != kept or capacity < length:
            return False
        if room.device.type != "cpu" or not room.is_contiguous():
            return False
    return True


def make_growable(cache: Any, kind: type[GrowableLayer] = GrowableLayer) -> None:  # noqa: ANN401
    """Make transformers' own layers of this kind: plain ones, and sliding ones that are empty."""
    if type(cache) is not DynamicCache:
        return
    for layer in cache.layers:
        empty = type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized
        if type(layer) is DynamicLayer or empty:
            _make_growable(layer, kind)


def _make_growable(layer: Any, kind: type[GrowableLayer]) -> None:  # noqa: ANN401 - a DynamicLayer
    """Turn transformers' own layer of a cache into one with room, keeping what it holds."""
    keys, values = layer.__dict__.pop("keys", None), layer.__dict__.pop("values", None)
    layer.__class__ = kind
    if keys is None or not keys.numel():
        layer.is_initialized = False
    elif isinstance(layer, LatentLayer):
        layer.hold(keys, values)
    else:
        layer.room = torch.stack((keys, values))
        layer.length = keys.shape[-2]
