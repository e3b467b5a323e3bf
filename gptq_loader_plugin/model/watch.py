"""See when a part of a model is replaced, moved or hooked after a step was built from it."""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter, eq, is_, itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.modules import module as torch_module

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = ["CountedModule", "CountedModuleDict", "Watch"]

# What a module computes by that is no tensor and no module of its own.
NUMBERS = (
    "variance_epsilon", "eps", "scaling", "sliding_window", "head_dim", "attn_logit_softcapping",
    "is_causal", "top_k", "norm_topk_prob", "use_rope", "residual_multiplier",
    "use_parallel_residual", "alpha", "limit", "routed_scaling_factor", "num_group", "topk_group",
    "topk_method",
)  # fmt: skip
CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)  # which nobody calls
SETTINGS = (  # of the config
    "_attn_implementation_internal", "final_logit_softcapping", "layer_types", "sliding_window",
    "rope_interleave",
)  # fmt: skip


_writes = attrgetter("_version")


class CountedModule(torch.nn.Module):
    """A module that counts what is changed of it: quicker to look at than all that it has.

    A tensor whose `data` is replaced by itself is not counted.

    Attributes:
        changes: how many there were.
        last_change: another object after each change of any such module: where it is the same, no
            module's count needs to be looked at, of which a mixture has thousands.
    """

    changes: int
    last_change: ClassVar[object] = object()

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - torch's
        """Set, and count it, but for what a module keeps to itself and what `eval` sets."""
        super().__setattr__(name, value)
        if not name.startswith("_") and name != "training":
            self._count()

    def __delattr__(self, name: str) -> None:
        """Delete, and count it."""
        super().__delattr__(name)
        self._count()

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - torch's
        """Register, and count it."""
        self._count()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Register, and count it."""
        self._count()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_buffer(
        self,
        name: str,
        tensor: torch.Tensor | None,
        persistent: bool = True,  # noqa: FBT001, FBT002 - torch's, which looks for this name
    ) -> None:
        """Register, and count it."""
        super().register_buffer(name, tensor, persistent)
        self._count()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - torch's way to .to()
        self._count()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _count(self) -> None:
        self.__dict__["changes"] = self.__dict__.get("changes", 0) + 1
        CountedModule.last_change = object()


class CountedModuleDict(CountedModule, torch.nn.ModuleDict):
    """Modules by name, as those of an expert, that count which are put in or taken out."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add or replace one, and count it."""
        super().add_module(name, module)
        self._count()

    def __delitem__(self, key: str) -> None:
        """Take one out, and count it."""
        super().__delitem__(key)
        self._count()

    def clear(self) -> None:
        """Take all out, and count it."""
        super().clear()
        self._count()


class Watch:
    """Everything of a model that a step was built from.

    Args:
        root: a model or its decoder, whose config the step goes by.
        inside: the modules whose place the step takes.
        counted: others, that count what is changed of them: packed linears, which are many.
        copied: tensors that the step has a copy of: what is written into them is seen, but into
            those of inference mode, which count no writes.

    Asked once a token, so it is lists that are gone through without a line of Python for each:
    modules and tensors by name, tensors' addresses, numbers and hooks. What is in a tensor is not
    compared: a step reads the tensor itself, whoever writes into it.
    """

    def __init__(
        self,
        root: Any,  # noqa: ANN401
        inside: Sequence[nn.Module],
        counted: Sequence[CountedModule] = (),
        copied: Sequence[torch.Tensor] = (),
    ) -> None:
        self.copied = [it for it in copied if not it.is_inference()]
        self.writes = self._count_writes()
        self.counted = [module.__dict__ for module in counted]
        self.last_change = (
            CountedModule.last_change
        )  # before they are counted: one may come between
        self.changes = self._count_changes()
        called = [it for it in inside if type(it) not in CONTAINERS]
        held = [
            (held, name, value)
            for module in (root, *inside)
            for held in (module._modules, module._parameters, module._buffers)  # noqa: SLF001 - what assigning to a module changes
            for name, value in held.items()
        ]
        self.holders, self.names, self.values = zip(*held, strict=True)
        self.tensors = [it for it in self.values if isinstance(it, torch.Tensor)]
        self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))
        self.own = [module.__dict__ for module in called]
        numbers = [
            (own, name, own[name]) for own in self.own for name in NUMBERS if name in own
        ] + [(vars(root.config), name, _setting(root, name)) for name in SETTINGS]
        self.owners, self.settings, self.numbers = zip(*numbers, strict=True)
        self.hooks = [
            hooks
            for module in called
            for hooks in (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001
        ]
        # those of every module there is
        self.hooks += torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks  # noqa: SLF001 - torch has no other way to tell

    def unchanged(self) -> bool:
        """Return whether all of it is as it was."""
        return (
            self._has_count()
            and not any(self.hooks)
            and self._count_writes() == self.writes
            and not any(map(dict.__contains__, self.own, repeat("forward")))
            and all(map(is_, map(dict.get, self.holders, self.names), self.values))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
            and all(map(eq, map(dict.get, self.owners, self.settings), self.numbers))
        )

    def _has_count(self) -> bool:
        """Return whether none of those that count was changed."""
        last_change = CountedModule.last_change
        if last_change is self.last_change:
            return True
        if self._count_changes() != self.changes:
            return False
        self.last_change = last_change  # it was of another model
        return True

    def _count_writes(self) -> int:
        return sum(map(_writes, self.copied))

    def _count_changes(self) -> int:
        return sum(map(itemgetter("changes"), self.counted))


def _setting(root: Any, name: str) -> Any:  # noqa: ANN401
    """Return a setting of the config as it is now: a list may be written into."""
    value = vars(root.config).get(name)
    return list(value) if isinstance(value, list) else value
