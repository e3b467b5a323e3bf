"""What reads many sequences in one pass, and what a batch of replies needs of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel

    from gptq_loader_plugin.generation.rotation import LengthRotation
    from gptq_loader_plugin.kernel import Batcher
    from gptq_loader_plugin.model.adapters import Adapters

__all__ = ["BatchedModel", "Engine"]


class Engine(Protocol):
    """Reads the tokens of many sequences in one pass, and keeps what it read, as PrefixCache does.

    Attributes:
        rotation: how its model rotates sequences of different lengths.
        max_sequences: for how many sequences it has room.
    """

    rotation: LengthRotation
    max_sequences: int

    @property
    def runs_ahead(self) -> bool:
        """Whether its device computes a step while the host goes on."""
        ...

    def step(
        self,
        tokens: Sequence[Sequence[int]],
        caches: Sequence[Any],
        lengths: Sequence[int],
        *,
        eager: bool = False,
    ) -> torch.Tensor:
        """Read new tokens of some sequences.

        Args:
            tokens: of each sequence.
            caches: of each sequence; what is read is added to them.
            lengths: of each sequence, what is read later included.
            eager: whether the model's own layers run, whoever watches or changes them.

        Returns:
            The logits after the last token of each [sequences, vocabulary].
        """
        ...

    def step_ahead(self, tokens: torch.Tensor, caches: Sequence[Any]) -> torch.Tensor:
        """Read a token of each of some sequences, int64 [sequences], as `step`; add none of them.

        For tokens whose values only the device knows yet.
        """
        ...

    def append(self, tokens: Sequence[int], caches: Sequence[Any]) -> None:
        """Add the tokens that `step_ahead` has read, once they are known."""
        ...

    def make(self, model: PreTrainedModel, rotation: tuple[int, ...] = ()) -> Any:  # noqa: ANN401 - the engine's own
        """Make an empty cache."""
        ...

    def reuse(
        self, model: PreTrainedModel, ids: Sequence[int], rotation: tuple[int, ...] = ()
    ) -> tuple[Any, int]:
        """Return a cache for `ids`, and how many of them it holds: never the last one."""
        ...

    def store(self, ids: list[int], cache: Any, rotation: tuple[int, ...] = ()) -> None:  # noqa: ANN401
        """Keep the cache of `ids` for sequences that begin the same, as long as there is room."""
        ...

    def clear(self) -> None:
        """Forget what is kept."""
        ...

    def reserve(self, sequences: int) -> int:
        """Have room for so many sequences; return the bytes that running ones may fill."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


class BatchedModel(Protocol):
    """A loaded model, as far as its replies are written side by side.

    Attributes:
        model: a transformers model.
        batcher: steps several sequences in one call, or None.
        engine: reads many sequences in one pass, or None.
        adapters: what is added to its layers for some replies, or None.
    """

    @property
    def model(self) -> PreTrainedModel:
        """A transformers model."""
        ...

    @property
    def batcher(self) -> Batcher | None:
        """What steps several sequences in one call."""
        ...

    @property
    def engine(self) -> Engine | None:
        """What reads many sequences in one pass."""
        ...

    @property
    def adapters(self) -> Adapters | None:
        """What is added to its layers for some replies."""
        ...
