"""Caches with room to grow in place, and kept from one reply to the next.

A conversation's next turn begins with all that was said before it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.generation.cache_layers import GrowableLayer, Int8Layer, LatentLayer
from gptq_loader_plugin.planning.model_shape import ModelShape
from gptq_loader_plugin.transformers_compat import find_cache_argument

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "PrefixCache",
    "check_int8",
    "looks_ahead",
    "make_cache",
    "make_int8_cache",
    "makes_own_cache",
]

Rotation = tuple[int, ...]  # of `LengthRotation.of`


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
    """Make an empty cache for `model`, with room where its layers are plain or latent attention.

    None for a model that makes one of its own class, or keeps nothing.
    """
    if makes_own_cache(model) or find_cache_argument(model) is None:
        return None
    cache = DynamicCache(config=model.config)
    if _keeps_plainly(model.config, cache):
        cache.layers = [GrowableLayer() for _ in cache.layers]  # type: ignore[no-untyped-call]
    elif _keeps_latents(model.config, cache):
        cache.layers = [LatentLayer() for _ in cache.layers]  # type: ignore[no-untyped-call]
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


def _keeps_latents(config: PreTrainedConfig, cache: DynamicCache) -> bool:
    """Return whether each layer of an empty cache is latent attention, and nothing more."""
    latent = ModelShape.of_config(config).latent_size is not None
    return bool(cache.layers) and latent and all(type(it) is DynamicLayer for it in cache.layers)


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
