"""Rotations that go by the length of a sequence: longrope and dynamic NTK.

transformers rotates by the length that a call sees: the greatest position of the tokens that are
read in it. A prompt that is read in parts, or a cache that was filled while its sequence was
shorter, would hold keys that were rotated otherwise than one call over the whole sequence rotates
them.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LengthRotation", "rope_limit"]

# A rotary module keeps what it computed last, so that threads take turns.
_turn = threading.RLock()


class LengthRotation:
    """How a model rotates sequences of different lengths.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - a transformers model
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        self._modules = [module for module in modules if _kinds(module)]

    def of(self, length: int) -> tuple[int, ...]:
        """Return what is the same for sequences that are rotated alike; () where all are."""
        return tuple(
            length if kind == "dynamic" and length > limit else int(length > limit)
            for module in self._modules
            for kind, limit in _kinds(module)
        )

    @property
    def varies(self) -> bool:
        """Whether some sequences are rotated otherwise than longer ones."""
        return bool(self._modules)

    @contextmanager
    def applied(self, length: int) -> Iterator[None]:
        """Have the model rotate what it reads as part of a sequence of `length` tokens."""
        if not self._modules:
            yield
            return
        with _turn:
            handles: list[Any] = []
            for module in self._modules:
                lengthened = _Lengthened(length)
                handles += (
                    module.register_forward_pre_hook(lengthened.before, with_kwargs=True),
                    module.register_forward_hook(lengthened.after),
                )
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()


def rope_limit(rotary: Any) -> int | None:  # noqa: ANN401 - a rotary module of transformers
    """Return up to how many positions sequences are rotated alike; None where all of them are."""
    return min((limit for _, limit in _kinds(rotary)), default=None)


class _Lengthened:
    """Hooks that show a rotary module one more position, the last of the sequence."""

    def __init__(self, length: int) -> None:
        self._last = length - 1

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - torch's hook
        """Add the position; a module that keeps the frequencies of longer ones forgets them."""
        named = "position_ids" in kwargs
        positions: torch.Tensor = kwargs["position_ids"] if named else args[1]
        first, last = torch.zeros_like(positions[..., :1]), positions[..., :1] * 0 + self._last

        def call_with(other: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if named:
                return args, {**kwargs, "position_ids": other}
            return (args[0], other, *args[2:]), kwargs

        again, more = call_with(first)
        module.forward(*again, **more)
        return call_with(torch.cat((positions, last), dim=-1))

    def after(self, module: Any, args: tuple[Any, ...], angles: Any) -> Any:  # noqa: ANN401 - torch's hook
        """Leave the position out of the angles [..., positions, size]."""
        del module, args
        if isinstance(angles, torch.Tensor):
            return angles[..., :-1, :]
        return type(angles)(it[..., :-1, :] for it in angles)


def _kinds(module: Any) -> list[tuple[str, int]]:  # noqa: ANN401
    """List the rotations of a module that go by the length, and up to where each stays the same.

    A module has one, or one for each type of layer.
    """
    kind = getattr(module, "rope_type", None)
    if not isinstance(kind, str | dict) or not hasattr(module, "config"):
        return []
    rotations = [(kind, module.config.rope_parameters)]
    if isinstance(kind, dict):
        rotations = [(it, module.config.rope_parameters[name]) for name, it in kind.items()]
    kinds = []
    for name, parameters in rotations:
        if "dynamic" in name:
            kinds.append(("dynamic", int(module.original_max_seq_len)))
        elif name == "longrope":
            kinds.append((name, int(parameters["original_max_position_embeddings"])))
    return kinds
