"""See when a part of a model is replaced, moved or hooked after a step was built from it."""

from __future__ import annotations

from itertools import repeat
from operator import eq, is_
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_module

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = ["Watch"]

# What a module computes by that is no tensor and no module of its own.
NUMBERS = (
    "variance_epsilon", "eps", "scaling", "sliding_window", "head_dim", "attn_logit_softcapping",
    "is_causal", "top_k", "norm_topk_prob", "use_rope", "residual_multiplier",
    "use_parallel_residual",
)  # fmt: skip
SETTINGS = (  # of the config
    "_attn_implementation_internal", "final_logit_softcapping", "layer_types", "sliding_window",
)  # fmt: skip


class Watch:
    """Everything of a model that a step was built from.

    Args:
        root: a model or its decoder, whose config the step goes by.
        inside: the modules whose place the step takes.

    Asked once a token, so it is lists that are gone through without a line of Python for each:
    modules and tensors by name, tensors' addresses, numbers and hooks. What is in a tensor is not
    compared: a step reads the tensor itself, whoever writes into it.
    """

    def __init__(self, root: Any, inside: Sequence[nn.Module]) -> None:  # noqa: ANN401
        held = [
            (held, name, value)
            for module in (root, *inside)
            for held in (module._modules, module._parameters, module._buffers)  # noqa: SLF001 - what assigning to a module changes
            for name, value in held.items()
        ]
        self.holders, self.names, self.values = zip(*held, strict=True)
        self.tensors = [it for it in self.values if isinstance(it, torch.Tensor)]
        self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))
        self.own = [module.__dict__ for module in inside]
        numbers = [
            (own, name, own[name]) for own in self.own for name in NUMBERS if name in own
        ] + [(vars(root.config), name, _setting(root, name)) for name in SETTINGS]
        self.owners, self.settings, self.numbers = zip(*numbers, strict=True)
        self.hooks = [
            hooks
            for module in inside
            for hooks in (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001
        ]
        # those of every module there is
        self.hooks += torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks  # noqa: SLF001 - torch has no other way to tell

    def unchanged(self) -> bool:
        """Return whether all of it is as it was."""
        return (
            not any(self.hooks)
            and not any(map(dict.__contains__, self.own, repeat("forward")))
            and all(map(is_, map(dict.get, self.holders, self.names), self.values))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
            and all(map(eq, map(dict.get, self.owners, self.settings), self.numbers))
        )


def _setting(root: Any, name: str) -> Any:  # noqa: ANN401
    """Return a setting of the config as it is now: a list may be written into."""
    value = vars(root.config).get(name)
    return list(value) if isinstance(value, list) else value
