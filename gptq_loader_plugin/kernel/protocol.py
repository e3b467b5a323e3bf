"""What a kernel is: a thing that may accept a layer, prepare its tensors once, and multiply.

A kernel answers `consider` from shapes alone, before any weight is read, so a choice can be made
and explained for a checkpoint or a device that is not on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gptq_loader_plugin.checkpoint.packing import pack_rows, unpack_rows
from gptq_loader_plugin.device import Device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from gptq_loader_plugin.checkpoint.packing import Bits, Layout
    from gptq_loader_plugin.events import Progress

__all__ = [
    "Accepted",
    "Batcher",
    "Closable",
    "Declined",
    "Device",
    "Finisher",
    "Kernel",
    "LayerSpec",
    "Meter",
    "PackedLinear",
    "ShortHead",
    "Shortener",
    "Tunable",
    "Verdict",
]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One quantised linear layer, by what its headers, its g_idx and its zeros say.

    Attributes:
        name: the module's path in the checkpoint, such as `model.layers.0.mlp.gate_proj`.
        in_features: K, the rows of the weight as GPTQ stores it.
        out_features: N, its columns.
        bits: the width of a code.
        group_size: input rows that share a scale, or -1 for one group.
        desc_act: whether the rows' groups are out of order (for one group: what the config says).
        sym: whether every zero is the same.
        groups: G, the number of groups.
        group_rows: the fewest and the most rows that any group has.
        group_unit: the greatest number that divides every group's rows.
        zero_range: the least and the greatest true zero.
        layout: how codes lie in words.
        scales_dtype: "float16", "bfloat16" or "float32".
        bias: whether the checkpoint has a bias beside it.
        model_dtype: the dtype of most of the model's plain weights, which it was made for.
    """

    name: str
    in_features: int
    out_features: int
    bits: Bits
    group_size: int
    desc_act: bool
    sym: bool
    groups: int
    group_rows: tuple[int, int]
    group_unit: int
    zero_range: tuple[int, int]
    layout: Layout = "continuous"
    scales_dtype: str = "float16"
    bias: bool = False
    model_dtype: str = "float16"

    def __str__(self) -> str:
        """Say what kind of layer this is, without its name."""
        group = "no groups" if self.group_size < 0 else f"groups of {self.group_size}"
        order = ", act-order" if self.desc_act else ""
        return f"{self.bits}-bit {self.in_features}x{self.out_features}, {group}{order}"

    @property
    def even_groups(self) -> bool:
        """Whether every group has the same number of rows."""
        return self.group_rows[0] == self.group_rows[1]

    @property
    def half_dtype(self) -> str:
        """The 16-bit dtype that holds this model's activations without overflow."""
        return "bfloat16" if "bfloat16" in (self.scales_dtype, self.model_dtype) else "float16"

    @property
    def packed_bytes(self) -> int:
        """The bytes of its codes, zeros and scales in a checkpoint, g_idx left out."""
        codes = self.in_features * self.out_features * self.bits // 8
        scale_bytes = 4 if self.scales_dtype == "float32" else 2
        return codes + self.groups * self.out_features * (8 * scale_bytes + self.bits) // 8


@dataclass(frozen=True, slots=True)
class Accepted:
    """The kernel can run the layer.

    Attributes:
        kernel: the kernel's name.
        rank: the higher is preferred.
        dtype: the dtype it computes in, as torch names it.
        prepared_bytes: what the layer takes in memory once prepared.
        note: what a user should know about this choice, or "".
        activations: what x is rounded to before it is multiplied, "int8", or "" for `dtype`.
    """

    kernel: str
    rank: int
    dtype: str
    prepared_bytes: int
    note: str = ""
    activations: str = ""

    @property
    def exactness(self) -> str:
        """The narrower of `activations` and `dtype`: what tolerances go by."""
        return self.activations or self.dtype


@dataclass(frozen=True, slots=True)
class Declined:
    """The kernel cannot run the layer, and why, in words for the user."""

    kernel: str
    reason: str


Verdict = Accepted | Declined


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A layer's tensors, checked: codes as the checkpoint packs them, zeros made true.

    The weight is w[n, k] = scales[g, n] * (codes[k, n] - zeros[g, n]) with g = g_idx[k].

    Attributes:
        qweight: int32 [K * bits / 32, N], as stored.
        zeros: uint8 [G, N], true zeros, whatever the format stored.
        scales: float [G, N], as stored.
        g_idx: int32 [K], the group of each row; always present here.
        bits: the width of a code.
        layout: how codes lie in `qweight`.
        bias: float [N], or None.
    """

    qweight: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bits: Bits
    layout: Layout = "continuous"
    bias: torch.Tensor | None = None

    def permutation(self) -> torch.Tensor | None:
        """Order the rows by group: int64 [K], or None where they are in order as they are.

        Rows of one group keep their order, so layers with the same g_idx share one permutation.
        """
        import torch

        if bool((self.g_idx[1:] >= self.g_idx[:-1]).all()):
            return None
        return torch.argsort(self.g_idx, stable=True)

    def codes(self, permutation: torch.Tensor | None = None) -> torch.Tensor:
        """Unpack the codes: uint8 [K, N], rows in the order of `permutation` where one is given."""
        import torch

        unpacked = torch.from_numpy(unpack_rows(self.qweight.numpy(), self.bits, self.layout))
        return unpacked if permutation is None else unpacked[permutation]

    def words(self, permutation: torch.Tensor | None = None) -> torch.Tensor:
        """Give the codes packed continuously: int32 [K * bits / 32, N], rows in that order.

        Raises:
            ValueError: 5, 6 and 7 bits have no continuous form.
        """
        import torch

        if self.bits in (5, 6, 7):
            raise ValueError(f"{self.bits}-bit codes are planar; unpack them with codes()")
        if permutation is None and (self.layout == "continuous" or 32 % self.bits == 0):
            return self.qweight
        codes = self.codes(permutation).numpy()
        return torch.from_numpy(pack_rows(codes, self.bits, "continuous"))

    def take_columns(self, columns: torch.Tensor) -> PackedLinear:
        """Take some output columns, int64 [n], as a smaller layer."""
        return replace(
            self,
            qweight=self.qweight[:, columns],
            zeros=self.zeros[:, columns],
            scales=self.scales[:, columns],
            bias=None if self.bias is None else self.bias[columns],
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Compute the weight in float32, then round it once: [N, K], rows in their own order."""
        import torch

        g_idx = self.g_idx.long()
        weight = self.codes().to(torch.float32)
        weight -= self.zeros.to(torch.float32)[g_idx]
        weight *= self.scales.to(torch.float32)[g_idx]
        return weight.t().contiguous().to(dtype or torch.float32)


@runtime_checkable
class Kernel(Protocol):
    """A way to multiply by a quantised weight."""

    @property
    def name(self) -> str:
        """The name users pass as `backend=`, and `explain` prints."""
        ...

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept or decline `layer` on `device`. Import nothing heavy, read no weight."""
        ...

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Lay the tensors out as the kernel wants them; called once per layer.

        The module is a plain y = x @ W.T + bias: x [..., in_features] in its original order and
        in any floating dtype, y [..., out_features] in x's dtype.
        """
        ...


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
        """Make what it takes, once the model is finished; give its bytes, 0 where it is not done.

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
        """Give all logits [rows, vocabulary]."""
        ...

    def likeliest(
        self, states: torch.Tensor, wanted: Sequence[int], aside: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Give each row's greatest logits, and minus infinity in place of some others.

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
        """Give it all back; the module is not called again."""
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
        """Read `size` bytes of the device's memory; give bytes a second, None where it cannot."""
        ...
