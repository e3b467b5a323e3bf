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

__all__ = [
    "CACHE_NAMES",
    "LAYER_CACHE_NAMES",
    "cache_argument",
    "cache_field",
    "find_cache_argument",
]

CACHE_NAMES = ("cache", "past_key_values")  # of a model's argument; the newest first
STATE_NAME = "cache_params"  # of Mamba's argument until 5.23, and of others that keep a state
LAYER_CACHE_NAMES = (*CACHE_NAMES, "past_key_value", "layer_past")  # of a decoder layer's argument


def cache_argument(model: Any) -> str:  # noqa: ANN401 - a transformers model or decoder
    """Return the name of the argument of `model.forward` that takes the cache."""
    return _cache_name(signature(model.forward).parameters)


def find_cache_argument(model: Any) -> str | None:  # noqa: ANN401
    """Return the name of the argument that a class's forward takes the cache by, or None."""
    parameters = signature(type(model).forward).parameters
    return next((name for name in (*CACHE_NAMES, STATE_NAME) if name in parameters), None)


def cache_field(output: type[Any]) -> str:
    """Return the name of the field of a class of transformers' outputs that holds the cache."""
    return _cache_name({field.name for field in fields(output)})


def _cache_name(names: Container[str]) -> str:
    newest, oldest = CACHE_NAMES
    return newest if newest in names else oldest
