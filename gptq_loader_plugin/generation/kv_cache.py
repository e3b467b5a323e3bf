"""Keys and values with room to grow in place, and kept from one reply to the next.

transformers' own cache copies every key and value for every token; a conversation's next turn
begins with all that was said before it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.planning.model_shape import ModelShape
from gptq_loader_plugin.system.large_pages import empty
from gptq_loader_plugin.transformers_compat import find_cache_argument

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "GrowableLayer",
    "Int8Layer",
    "PrefixCache",
    "check_int8",
    "looks_ahead",
    "make_cache",
    "make_int8_cache",
    "makes_own_cache",
]

Rotation = tuple[int, ...]  # of `LengthRotation.of`
MIN_CAPACITY = 256  # positions
GROWTH = 1.25
MAX_CODE = 127


class GrowableLayer(DynamicLayer):
    """One layer's keys and values, [batch, kv_heads, length, head_dim], in memory that has room.

    A layer that slides sees the same through its mask: all of its positions are kept.
    """

    length = 0
    room: torch.Tensor | None = None  # [2, batch, kv_heads, capacity, head_dim]

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys of the positions that are filled."""
        return None if self.room is None else self.room[0, :, :, : self.length]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._set(0, value)

    @property
    def values(self) -> torch.Tensor | None:
        """The values of the positions that are filled."""
        return None if self.room is None else self.room[1, :, :, : self.length]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._set(1, value)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the device and dtype; transformers' name for it."""
        del value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values; return all of them."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, length = self.length, self.length + key_states.shape[-2]
        room = self.reserve(length, key_states)  # for which there may be no memory
        room[0, :, :, before:length] = key_states
        room[1, :, :, before:length] = value_states
        self.length = length
        return room[0, :, :, : self.length], room[1, :, :, : self.length]

    def reserve(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """Have room for `length` positions of keys [batch, kv_heads, .., head_dim] like `like`."""
        old = self.room
        if old is not None and old.shape[3] >= length:
            return old
        batch, heads, _, size = like.shape
        capacity = max(MIN_CAPACITY, int(length * GROWTH))
        self.room = empty((2, batch, heads, capacity, size), like.dtype, like.device)
        if old is not None:
            kept = min(self.length, old.shape[3])
            self.room[:, :, :, :kept] = old[:, :, :, :kept]
        return self.room

    def get_seq_length(self) -> int:
        """Count the positions that are filled."""
        return self.length

    def reset(self) -> None:
        """Forget every position; transformers of before 5.24 would fill them with zeros."""
        self.room, self.length, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -n positions; a positive n is how many are left (transformers' way)."""
        left = self.length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self.length = max(min(self.length, left), 0)

    def _set(self, which: int, value: torch.Tensor | None) -> None:
        if value is None:
            self.room, self.length = None, 0
            return
        other = value if self.room is None else (self.values if which == 0 else self.keys)
        if other is None or other.shape != value.shape:
            other = torch.empty_like(value)  # its own value follows
        self.room = torch.stack((value, other) if which == 0 else (other, value))
        self.length = value.shape[-2]


class Int8Layer(GrowableLayer):
    """The same in 8 bits: a code for each number, and a scale for each head of a position.

    A number is its code times the scale, which the greatest number of the head gives the code 127.
    Half of what bfloat16 takes. The native step reads the codes as they are; other attention is
    given the keys and values of every position, made anew for each call.
    """

    scales: torch.Tensor | None = None  # float32 [2, batch, kv_heads, capacity]

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys of the positions that are filled."""
        return self._read(0)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._set(0, value)

    @property
    def values(self) -> torch.Tensor | None:
        """The values of the positions that are filled."""
        return self._read(1)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._set(1, value)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values; return all of them."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, length = self.length, self.length + key_states.shape[-2]
        self.reserve(length, key_states)
        self._write(0, before, key_states)
        self._write(1, before, value_states)
        self.length = length
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys, values

    def reserve(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """Have room for `length` positions of keys [batch, kv_heads, .., head_dim] like `like`."""
        old, scales = self.room, self.scales
        room = super().reserve(length, torch.empty_like(like[..., :0, :], dtype=torch.int8))
        if room is not old:
            self.scales = torch.zeros(room.shape[:4], device=room.device)
            if scales is not None:
                kept = min(self.length, scales.shape[3])
                self.scales[..., :kept] = scales[..., :kept]
        return room

    def reset(self) -> None:
        """Forget every position."""
        super().reset()
        self.scales = None

    def _read(self, which: int) -> torch.Tensor | None:
        if self.room is None or self.scales is None:
            return None
        codes = self.room[which, :, :, : self.length].to(self.dtype)
        return codes.mul_(self.scales[which, :, :, : self.length, None])

    def _write(self, which: int, before: int, new: torch.Tensor) -> None:
        assert self.room is not None
        assert self.scales is not None
        length = before + new.shape[-2]
        scales = new.abs().amax(dim=-1).float() / MAX_CODE
        inverse = torch.where(scales > 0, 1 / scales, 0)
        self.room[which, :, :, before:length] = (new * inverse[..., None]).round_().to(torch.int8)
        self.scales[which, :, :, before:length] = scales

    def _set(self, which: int, value: torch.Tensor | None) -> None:
        if value is None:
            self.reset()
            return
        other = self.values if which == 0 else self.keys
        if other is None or other.shape != value.shape:
            other = torch.zeros_like(value)  # its own value follows
        self.reset()
        self.update(*((value, other) if which == 0 else (other, value)))


def makes_own_cache(model: Any) -> bool:  # noqa: ANN401 - a transformers model or decoder
    """Return whether a model's cache is one of a class of its own."""
    takes_any: Any = getattr(model, "_supports_default_dynamic_cache", None)
    return takes_any is not None and not takes_any()


def looks_ahead(model: Any) -> bool:  # noqa: ANN401 - a transformers model or decoder
    """Return whether a prompt's tokens see those after them, as PaliGemma's do.

    transformers' `generate` reads a prompt whole, and each token after it with what is before
    alone. One forward pass over both answers otherwise, and so do parts of a prompt.
    """
    text: Any = model.config.get_text_config()
    return getattr(text, "use_bidirectional_attention", None) is True  # Gemma 4: of pictures alone


def make_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Make an empty cache for `model`, with room where its layers are plain attention.

    None for a model that makes one of its own class, or keeps nothing.
    """
    if makes_own_cache(model) or find_cache_argument(model) is None:
        return None
    cache = DynamicCache(config=model.config)
    if _keeps_plainly(model.config, cache):
        cache.layers = [GrowableLayer() for _ in cache.layers]  # type: ignore[no-untyped-call]
    return cache


def make_int8_cache(model: PreTrainedModel) -> DynamicCache:
    """Make an empty cache that keeps keys and values in 8 bits.

    Raises:
        OptionInvalid: the model keeps other than plain keys and values.
    """
    cache = make_cache(model)
    if cache is None:
        raise _not_in_int8(model.config)
    check_int8(model.config)
    cache.layers = [Int8Layer() for _ in cache.layers]  # type: ignore[no-untyped-call]
    return cache


def check_int8(config: PreTrainedConfig) -> None:
    """Refuse keys and values of 8 bits where they cannot be had, before anything is loaded.

    Raises:
        OptionInvalid: the model keeps other than plain keys and values.
    """
    if not _keeps_plainly(config, DynamicCache(config=config)):
        raise _not_in_int8(config)


def _not_in_int8(config: PreTrainedConfig) -> OptionInvalid:
    return OptionInvalid(
        f"this {config.model_type} model keeps more than keys and values of one width: its context "
        "cannot be in 8 bits",
        hint="leave the 8 bits out",
    )


def _keeps_plainly(config: PreTrainedConfig, cache: DynamicCache) -> bool:
    """Return whether each layer of an empty cache is plain attention, its heads of one width."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    alike = ModelShape.of_config(config).latent_size is None
    return bool(cache.layers) and alike and all(type(layer) in plain for layer in cache.layers)


class PrefixCache:
    """The caches of the last sequences, for those that begin the same.

    Args:
        kind: "int8" keeps keys and values in 8 bits.
        max_sequences: how many sequences are kept.
    """

    def __init__(self, kind: Literal["int8"] | None = None, *, max_sequences: int = 1) -> None:
        self._make = make_cache if kind is None else make_int8_cache
        self._lock = threading.Lock()
        self._kept: list[tuple[list[int], Any, Rotation]] = []  # the newest last
        self.max_sequences = max_sequences

    def make(self, model: PreTrainedModel, rotation: Rotation = ()) -> Any:  # noqa: ANN401 - transformers' caches
        """Make an empty cache, or None for a model that takes none of ours."""
        del rotation
        return self._make(model)

    def reuse(
        self, model: PreTrainedModel, ids: Sequence[int], rotation: Rotation = ()
    ) -> tuple[Any, int]:
        """Return a cache for `ids`, and how many of them it holds: never the last one.

        A cache in use is nobody else's: two replies at a time have one each.

        Args:
            model: whose cache it is.
            ids: the tokens.
            rotation: how `ids` are rotated, where that goes by their length; a cache of others is
                none of theirs.
        """
        with self._lock:
            same, at = max(
                (
                    (_same(old, ids), i)
                    for i, (old, _, rotated) in enumerate(self._kept)
                    if rotated == rotation
                ),
                default=(0, 0),
            )
            if same and len(self._kept) < self.max_sequences and same < len(self._kept[at][0]) // 2:
                same = 0  # another conversation's: there is room for both
            cache = self._kept.pop(at)[1] if same else None
        if cache is None:
            return self._make(model), 0
        for layer in cache.layers:
            layer.crop(same - layer.length)
        return cache, same

    def store(
        self,
        ids: list[int],
        cache: Any,  # noqa: ANN401 - transformers' caches
        rotation: Rotation = (),
    ) -> None:
        """Keep the cache of `ids`, where it can be cut short."""
        layers = getattr(cache, "layers", None)
        if not layers or not all(isinstance(layer, GrowableLayer) for layer in layers):
            return
        held = min((layer.length for layer in cache.layers), default=0)
        with self._lock:
            self._kept = [*self._kept, (ids[:held], cache, rotation)][-self.max_sequences :]

    def clear(self) -> None:
        """Free the memory."""
        with self._lock:
            self._kept.clear()


def _same(old: Sequence[int], ids: Sequence[int]) -> int:
    """Count the first tokens that are the same, the last of `ids` left out."""
    limit = min(len(old), len(ids) - 1)
    return next((i for i in range(limit) if old[i] != ids[i]), limit)
