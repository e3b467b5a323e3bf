"""Know the names that transformers has changed between the versions that are supported.

The keys and values of what was read are the argument `cache` of a model and the field `cache` of
its output since transformers 5.24, and `past_key_values` before.
"""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["CACHE_NAMES", "LAYER_CACHE_NAMES", "cache_argument", "cache_field"]

CACHE_NAMES = ("cache", "past_key_values")  # of a model's argument; the newest first
LAYER_CACHE_NAMES = (*CACHE_NAMES, "past_key_value", "layer_past")  # of a decoder layer's argument


def cache_argument(model: Any) -> str:  # noqa: ANN401 - a transformers model or decoder
    """Return the name of the argument of `model.forward` that takes the cache."""
    return _cache_name(signature(model.forward).parameters)


def cache_field(output: type[Any]) -> str:
    """Return the name of the field of a class of transformers' outputs that holds the cache."""
    return _cache_name({field.name for field in fields(output)})


def _cache_name(names: Container[str]) -> str:
    newest, oldest = CACHE_NAMES
    return newest if newest in names else oldest
