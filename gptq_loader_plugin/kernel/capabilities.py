"""What a kernel may do beyond multiplying by one layer; the core asks by `isinstance`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.kernel.layer import LayerSpec

__all__ = ["Batcher", "Closable", "Finisher", "Meter", "ShortHead", "Shortener", "Tunable"]


@runtime_checkable
class Finisher(Protocol):
    """A kernel that does more for a whole model than for its layers one by one."""

    def finish(self, model: PreTrainedModel) -> str:
        """Look at a filled model once, every layer in place; say in words what was done.

        The model must answer as before, to rounding.
        """
        ...


@runtime_checkable
class Batcher(Protocol):
    """What a kernel's `finish` may put behind a decoder's `forward`: it steps several sequences.

    `Batch` finds it as the owner of that method.
    """

    def step_many(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[Any]
    ) -> torch.Tensor | None:
        """Read a few new tokens of each of some sequences, which need not be as long.

        Args:
            tokens: of each sequence, 1 to 8.
            caches: one of each sequence; what is read is added to it.

        Returns:
            The decoder's states [tokens of all, hidden], or None where this cannot be done here
            and nothing was read.
        """
        ...


@runtime_checkable
class Shortener(Protocol):
    """A kernel that can have a model's head give its greatest logits without computing all."""

    def shortlist_bytes(self, config: Mapping[str, Any], head: LayerSpec) -> int:
        """Count what that takes in memory: 0 where it is not done.

        Args:
            config: the model's config.json.
            head: the head, made 8-bit.
        """
        ...

    def shorten(self, model: PreTrainedModel) -> int:
        """Make what it takes, once the model is finished; return its bytes, 0 where it is not done.

        The head of the model is a `ShortHead` from then on.
        """
        ...


@runtime_checkable
class ShortHead(Protocol):
    """A head, a plain linear layer, that can give its greatest logits alone."""

    @property
    def out_features(self) -> int:
        """The vocabulary."""
        ...

    @property
    def taken(self) -> int:
        """The bytes it holds beside its weight, which it reads to find the greatest."""
        ...

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return all logits [rows, vocabulary]."""
        ...

    def likeliest(
        self, states: torch.Tensor, wanted: Sequence[int], aside: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return each row's greatest logits, and minus infinity in place of some others.

        Args:
            states: the decoder's states [rows, hidden].
            wanted: how many of each row's logits are to be there, and exact; those that tie with
                the last of them too.
            aside: bool [rows, vocabulary], tokens that do not count among these; their logits are
                there where they are as great.

        Returns:
            The logits [rows, vocabulary], or None where this cannot be done here.
        """
        ...


@runtime_checkable
class Closable(Protocol):
    """A prepared module that holds more than its tensors, such as what a library allocated."""

    def close(self) -> None:
        """Return it all back; the module is not called again."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A kernel that can measure on a device how to run best there, and keep what it found."""

    def tune(
        self,
        layers: Sequence[LayerSpec],
        device: Device,
        progress: Callable[[Progress], None],
    ) -> str:
        """Measure on layers of these shapes, which it accepts; say what was found and is kept."""
        ...


@runtime_checkable
class Meter(Protocol):
    """A kernel that can measure how fast its device's memory is read."""

    def read_bandwidth(self, size: int, device: Device) -> float | None:
        """Read `size` bytes of the device's memory; return bytes a second, None where it cannot."""
        ...
