"""One layer's keys and values, with room to grow in place.

transformers' own layers copy every key and value for every token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from transformers.cache_utils import DynamicLayer

from gptq_loader_plugin.system.large_pages import empty

__all__ = ["GrowableLayer", "Int8Layer", "LatentLayer"]

MIN_CAPACITY = 256  # positions
GROWTH = 1.25
MAX_CODE = 127


class GrowableLayer(DynamicLayer):
    """One layer's keys and values, [batch, kv_heads, length, head_dim], in memory that has room.

    A layer that slides sees the same through its mask: all of its positions are kept.
    """

    rooms: ClassVar[int] = 2  # side by side: keys', and values'
    length = 0
    room: torch.Tensor | None = None  # [rooms, batch, kv_heads, capacity, head_dim]

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
        self.room = empty((self.rooms, batch, heads, capacity, size), like.dtype, like.device)
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

    def _read(self, which: int) -> torch.Tensor | None:
        """Give the keys (0) or the values (1) of the positions that are filled."""
        return None if self.room is None else self.room[which, :, :, : self.length]

    def _set(self, which: int, value: torch.Tensor | None) -> None:
        if value is None:
            self.room, self.length = None, 0
            return
        other = value if self.room is None else (self.values if which == 0 else self.keys)
        if other is None or other.shape != value.shape:
            other = torch.empty_like(value)  # its own value follows
        self.room = torch.stack((value, other) if which == 0 else (other, value))
        self.length = value.shape[-2]


class LatentLayer(GrowableLayer):
    """The same where keys and values are of two widths: each value lies beside its key.

    What transformers keeps of latent attention as keys are the latents, normed, and as values what
    is rotated, the same for all heads: [batch, 1, length, kv_lora_rank or qk_rope_head_dim].
    """

    rooms = 1  # of both: [1, batch, kv_heads, capacity, key_size and a value's width]
    key_size = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the device, the dtype and the width of a key."""
        super().lazy_initialization(key_states, value_states)
        self.key_size = key_states.shape[-1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values; return all of them."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = torch.cat((key_states, value_states), dim=-1)
        before, length = self.length, self.length + new.shape[-2]
        room = self.reserve(length, new)
        room[0, :, :, before:length] = new
        self.length = length
        return room[0, :, :, :length, : self.key_size], room[0, :, :, :length, self.key_size :]

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Have these keys and values, and no others."""
        self.key_size, self.length = keys.shape[-1], keys.shape[-2]
        self.room = torch.cat((keys, values), dim=-1)[None]

    def _read(self, which: int) -> torch.Tensor | None:
        if self.room is None:
            return None
        both = self.room[0, :, :, : self.length]
        return both[..., : self.key_size] if which == 0 else both[..., self.key_size :]

    def _set(self, which: int, value: torch.Tensor | None) -> None:
        if value is None:
            self.room, self.length = None, 0
            return
        other = self.values if which == 0 else self.keys
        if other is None or other.shape[:-1] != value.shape[:-1]:
            width = 0 if other is None else other.shape[-1]
            other = value.new_zeros((*value.shape[:-1], width))  # its own value follows
        self.hold(*((value, other) if which == 0 else (other, value)))


class Int8Layer(GrowableLayer):
    """The same in 8 bits: a code for each number, and a scale for each head of a position.

    A number is its code times the scale, which the greatest number of the head gives the code 127.
    Half of what bfloat16 takes. The native step reads the codes as they are; other attention is
    given the keys and values of every position, made anew for each call.
    """

    scales: torch.Tensor | None = None  # float32 [2, batch, kv_heads, capacity]

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
