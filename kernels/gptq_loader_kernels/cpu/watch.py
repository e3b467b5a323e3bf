"""See when a part of a decoder is replaced, moved or hooked after a step was built from it."""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["Watch", "modules_inside"]


class Watch:
    """Everything of a decoder that a step was built from.

    Asked once a token, so it is lists that are gone through without a line of Python for each:
    modules and tensors by name, tensors' addresses, and hooks.
    """

    def __init__(self, decoder: Any) -> None:  # noqa: ANN401
        inside = list(modules_inside(decoder))
        held = [
            (held, name, value)
            for module in (decoder, *inside)
            for held in (module._modules, module._parameters, module._buffers)  # noqa: SLF001 - what assigning to a module changes
            for name, value in held.items()
        ]
        self.holders, self.names, self.values = zip(*held, strict=True)
        self.tensors = [it for it in self.values if isinstance(it, torch.Tensor)]
        self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))
        self.hooks = [
            hooks
            for module in inside
            for hooks in (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001
        ]
        self.own = [module.__dict__ for module in inside]

    def unchanged(self) -> bool:
        """Say whether all of it is as it was."""
        return (
            not any(self.hooks)
            and not any("forward" in own for own in self.own)
            and all(map(is_, map(dict.get, self.holders, self.names), self.values))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
        )


def modules_inside(decoder: Any) -> Iterator[nn.Module]:  # noqa: ANN401
    """Go through the modules whose place a step takes."""
    yield from decoder.layers.modules()
    yield decoder.norm
