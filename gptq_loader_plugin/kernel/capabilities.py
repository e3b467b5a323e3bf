"""What a kernel may do beyond multiplying by one layer; the core asks by `isinstance`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.kernel.layer import LayerSpec

__all__ = [
    "Batcher",
    "Closable",
    "Finished",
    "Finisher",
    "FusedOperators",
    "Joinable",
    "Meter",
    "PagedAttention",
    "TopLogitsHead",
    "TopLogitsKernel",
    "Tunable",
]


@dataclass(frozen=True, slots=True)
class Finished:
    """What a kernel did to a model as a whole.

    Attributes:
        note: that in words, as part of a sentence: "decodes natively".
        batcher: steps several sequences in one call, where the kernel can; None elsewhere.
    """

    note: str
    batcher: Batcher | None = None


@runtime_checkable
class Finisher(Protocol):
    """A kernel that does more for a whole model than for its layers one by one."""

    def finish(self, model: PreTrainedModel) -> Finished:
        """Look at a filled model once, every layer in place, and return what was done to it.

        The model must answer as before, to rounding.
        """
        ...


@runtime_checkable
class Batcher(Protocol):
    """Steps several sequences of one model in one call, for a kernel that finished the model."""

    def step_many(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[Any]
    ) -> torch.Tensor | None:
        """Read a few new tokens of each of some sequences, which need not be as long.

        Args:
            tokens: of each sequence, 1 to 8.
            caches: one of each sequence; what is read is added to it.

        Returns:
            The decoder's states [tokens of all, hidden], or None where this cannot be done here
            and nothing was read: the decoder's `forward` was replaced since, for one.
        """
        ...


@runtime_checkable
class TopLogitsKernel(Protocol):
    """A kernel that can have a model's head return its top logits without computing all of them."""

    def top_logits_bytes(self, config: Mapping[str, Any], head: LayerSpec) -> int:
        """Return the memory this takes, in bytes: 0 where it is not done.

        Args:
            config: the model's config.json.
            head: the head, made 8-bit.
        """
        ...

    def add_top_logits(self, model: PreTrainedModel) -> int:
        """Make the head of a finished model a `TopLogitsHead`.

        Returns:
            The memory this took, in bytes: 0 where it was not done.
        """
        ...


@runtime_checkable
class TopLogitsHead(Protocol):
    """A head, a plain linear layer, that can return its top logits alone."""

    @property
    def out_features(self) -> int:
        """The vocabulary."""
        ...

    @property
    def extra_bytes(self) -> int:
        """The bytes it holds beside its weight, which it reads to find the top logits."""
        ...

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return all logits [rows, vocabulary]."""
        ...

    def top_logits(
        self, states: torch.Tensor, needed: Sequence[int], excluded: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return each row's top logits, and minus infinity in place of some others.

        Args:
            states: the decoder's states [rows, hidden].
            needed: how many of each row's logits must be there, and exact; those that tie with the
                last of them are there too.
            excluded: bool [rows, vocabulary], tokens that do not count among these; their logits
                are there where they are as great.

        Returns:
            The logits [rows, vocabulary], or None where this cannot be done here.
        """
        ...


@runtime_checkable
class Closable(Protocol):
    """A prepared module that holds more than its tensors, such as what a library allocated."""

    def close(self) -> None:
        """Free it all; the module is not called again."""
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


@runtime_checkable
class PagedAttention(Protocol):
    """Attention over keys and values in blocks, on one kind of device.

    Neither method waits for the device or looks at a value: a CUDA graph captures them.
    """

    def write_cache(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
        *,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> None:
        """Write the keys and values of tokens into blocks.

        Args:
            keys: [tokens, kv_heads, head_dim].
            values: [tokens, kv_heads, value_dim].
            key_cache: [blocks, block_size, kv_heads, head_dim], in the dtype of the keys or int8.
            value_cache: [blocks, block_size, kv_heads, value_dim].
            slots: where each token goes, block x block_size + offset, int64 [tokens]; less than 0
                for nowhere.
            key_scales: takes the scale of each head, float16 [blocks, block_size, kv_heads], where
                the cache is int8; else None.
            value_scales: as key_scales.
        """
        ...

    def decode(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from the last token of each sequence to all of its positions.

        Args:
            query: [sequences, heads, head_dim].
            key_cache: [blocks, block_size, kv_heads, head_dim].
            value_cache: [blocks, block_size, kv_heads, value_dim].
            block_tables: the blocks of each sequence, int32 [sequences, blocks].
            lengths: positions of each sequence, its last token's included, int32 [sequences]; 0 for
                a row that is no sequence.
            scale: what products are multiplied by.
            window: how many of the last positions are seen; None for all.
            softcap: scores are softcap * tanh(score / softcap); None for as they are.
            sinks: a score for each head that no value goes with [heads]; None for none.
            key_scales: as in `write_cache`.
            value_scales: as in `write_cache`.

        Returns:
            [sequences, heads, value_dim], in the dtype of the query.
        """
        ...


@runtime_checkable
class FusedOperators(PagedAttention, Protocol):
    """Attention over blocks, and what a decode step computes between its products.

    As with attention, none waits for the device or looks at a value.

    `style` says how a norm rounds: "llama" rounds to x's dtype before it multiplies by the weight,
    "gemma" multiplies by 1 + weight in float32 and rounds after.
    """

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, style: str
    ) -> torch.Tensor:
        """Normalise the last dimension by its root mean square: x [tokens, D], weight [D]."""
        ...

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        style: str,
        post_weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add x [tokens, D] to the residual, and normalise; x first, where it has a `post_weight`.

        Returns:
            The normalised sum and the sum, [tokens, D] each.
        """
        ...

    def rotary_and_cache(  # noqa: PLR0913 - all that one kernel reads
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
        *,
        query_weight: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        eps: float,
        style: str,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotate query and keys by halves, and write keys and values into blocks.

        Args:
            query: [tokens, heads, head_dim]; like keys and values it may be a part of a product.
            keys: [tokens, kv_heads, head_dim].
            values: [tokens, kv_heads, value_dim].
            cos: [tokens, R], for the first 2 * R dimensions of a head.
            sin: [tokens, R].
            key_cache: as in `write_cache`.
            value_cache: as in `write_cache`.
            slots: as in `write_cache`.
            query_weight: of a norm of each head before it is rotated [head_dim]; None for none.
            key_weight: as query_weight.
            eps: of those norms.
            style: of those norms.
            key_scales: as in `write_cache`.
            value_scales: as in `write_cache`.

        Returns:
            The rotated query [tokens, heads, head_dim].
        """
        ...

    def activation_and_mul(self, joined: torch.Tensor, *, activation: str) -> torch.Tensor:
        """Multiply act(gate) by up, both in one tensor [tokens, 2 * I], gate first.

        `activation` is "silu" or "gelu_pytorch_tanh".
        """
        ...


@runtime_checkable
class Joinable(Protocol):
    """A prepared module that can multiply in one product with others which read the same x."""

    def join(self, others: Sequence[torch.nn.Module]) -> torch.nn.Module | None:
        """Join this module and others, q, k and v for instance, side by side.

        The modules go on to multiply by themselves; their tensors become parts of the joined one's,
        so that the device holds each once.

        Returns:
            A module of all outputs, x [..., in_features] -> [..., sum of out_features], or None
            where they are not laid out alike.
        """
        ...


@runtime_checkable
class Stackable(Protocol):
    """A prepared module that can be one expert of many in a product which looks up no expert.

    On the host, that is: which expert multiplies a row is a value on the device, so that a step of
    a mixture waits for nothing and can be captured.
    """

    def stack(self, experts: Sequence[Sequence[torch.nn.Module]]) -> torch.nn.Module | None:
        """Stack experts; this module is the first one's first part.

        The modules go on to multiply by themselves; their tensors become parts of the stacked ones,
        so that the device holds each once.

        Args:
            experts: of each, one or more modules that read the same x: gate and up, for instance.

        Returns:
            A module that takes x [rows / n, in_features] and int64 [rows], the expert of each row,
            n of which are of one row of x in order; it returns [rows, sum of out_features of an
            expert's parts]. None where they are not laid out alike.
        """
        ...
