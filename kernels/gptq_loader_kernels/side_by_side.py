"""Join prepared modules that read the same x, and stack those of a mixture's experts.

Imports torch.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["join_modules", "stack_modules"]

Prepared = TypeVar("Prepared", bound=torch.nn.Module)

# Elements behind a joined tensor: a kernel reads whole tiles of columns, beyond those of the last
# part too, whose rows are as far apart as the joined ones.
SLACK = 1024


def join_modules(
    first: Prepared,
    others: Sequence[torch.nn.Module],
    *,
    settings: Sequence[str],
    along: Mapping[str, int | None],
) -> Prepared | None:
    """Join modules of one kind; their buffers become parts of the joined one's.

    Args:
        first: a prepared module.
        others: those whose outputs follow.
        settings: attributes that must be equal.
        along: of each buffer, the dimension of the outputs; None where all must have the same.

    Returns:
        A module like the first with the outputs of all, or None where they do not go together.
    """
    parts: list[Any] = [first, *others]
    if not all(type(it) is type(first) and _alike(first, it, settings, along) for it in others):
        return None
    joined: Any = copy.copy(first)
    joined._buffers = dict(first._buffers)  # noqa: SLF001 - a copy shares it with its model
    joined.out_features = sum(it.out_features for it in parts)
    for name, dim in along.items():
        buffers = [part.get_buffer(name) for part in parts if getattr(part, name) is not None]
        if dim is None or not buffers:
            continue
        whole = _concatenated(buffers, dim)
        setattr(joined, name, whole)
        at = 0
        for part, buffer in zip(parts, buffers, strict=True):
            size = buffer.shape[dim]
            setattr(part, name, whole.narrow(dim, at, size))
            at += size
    return joined  # type: ignore[no-any-return]


def stack_modules(
    experts: Sequence[Sequence[torch.nn.Module]],
    *,
    settings: Sequence[str],
    along: Mapping[str, int | None],
) -> dict[str, torch.Tensor | None] | None:
    """Stack the tensors of experts; the modules' own become parts of those.

    Args:
        experts: of each, one or more modules that read the same x, which are joined.
        settings: attributes that must be equal in the modules of one place.
        along: of each buffer, the dimension of the outputs; None where an expert's modules must
            have the same.

    Returns:
        Of each buffer the stacked one, [experts, ...], or None where they have none; None in place
        of all where they do not go together.
    """
    for expert in experts:
        if len(expert) != len(experts[0]) or not all(
            _same_form(one, other, settings, along)
            for one, other in zip(experts[0], expert, strict=True)
        ):
            return None
        if not all(_alike(expert[0], other, settings, along) for other in expert[1:]):
            return None
    return {name: _stacked(experts, name, dim) for name, dim in along.items()}


def _stacked(experts: Sequence[Sequence[Any]], name: str, dim: int | None) -> torch.Tensor | None:
    if getattr(experts[0][0], name) is None:
        return None
    shape = list(getattr(experts[0][0], name).shape)
    if dim is not None:
        shape[dim] = sum(getattr(part, name).shape[dim] for part in experts[0])
    buffer = experts[0][0].get_buffer(name)
    size = len(experts) * torch.Size(shape).numel()
    whole: torch.Tensor = buffer.new_zeros(size + SLACK)[:size].view(len(experts), *shape)
    for joined, expert in zip(whole, experts, strict=True):
        at = 0
        for part in expert:
            own = joined
            if dim is not None:
                own = joined.narrow(dim, at, part.get_buffer(name).shape[dim])
                at += own.shape[dim]
            own.copy_(part.get_buffer(name))
            setattr(part, name, own)
    return whole


def _alike(
    one: Any,  # noqa: ANN401 - modules of any kernel
    other: Any,  # noqa: ANN401
    settings: Sequence[str],
    along: Mapping[str, int | None],
) -> bool:
    if any(getattr(one, name) != getattr(other, name) for name in settings):
        return False
    return all(_fit(getattr(one, name), getattr(other, name), dim) for name, dim in along.items())


def _same_form(
    one: Any,  # noqa: ANN401 - modules of any kernel
    other: Any,  # noqa: ANN401
    settings: Sequence[str],
    names: Iterable[str],
) -> bool:
    """Return whether two modules differ in nothing but what their tensors hold."""

    def form(module: Any) -> list[Any]:  # noqa: ANN401
        buffers = [getattr(module, name) for name in names]
        return [
            module.out_features,
            *(getattr(module, name) for name in settings),
            *(None if it is None else (it.shape, it.dtype, it.device) for it in buffers),
        ]

    return type(one) is type(other) and form(one) == form(other)


def _fit(one: torch.Tensor | None, other: torch.Tensor | None, dim: int | None) -> bool:
    """Return whether two buffers can be joined along a dimension, or are the same."""
    if one is None or other is None:
        return one is other
    if dim is None:
        return torch.equal(one, other)
    shapes = [[size for at, size in enumerate(it.shape) if at != dim] for it in (one, other)]
    return one.dtype == other.dtype and one.device == other.device and shapes[0] == shapes[1]


def _concatenated(buffers: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    shape = list(buffers[0].shape)
    shape[dim] = sum(it.shape[dim] for it in buffers)
    size = torch.Size(shape).numel()
    whole = buffers[0].new_zeros(size + SLACK)[:size].view(shape)
    return torch.cat(tuple(buffers), dim=dim, out=whole)
