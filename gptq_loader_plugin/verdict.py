"""A kernel's answer about one layer: it can run it, at a rank, or it cannot, for a reason."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Accepted", "Declined", "Verdict"]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The kernel can run the layer.

    Attributes:
        kernel: the kernel's name.
        rank: the higher is preferred.
        dtype: the dtype it computes in, as torch names it.
        prepared_bytes: what the layer takes in memory once prepared.
        note: what a user should know about this choice, or "".
        scratch_bytes: what a product takes besides, in memory that all layers of a device share one
            after the other: a plan counts the largest, once.
        rank_if_fits: the rank in place of `rank` where the device's free memory holds the model
            prepared by this kernel whole, with a context and some to spare; None for `rank`.
        activations: what x is rounded to before it is multiplied, "int8", or "" for `dtype`.
    """

    kernel: str
    rank: int
    dtype: str
    prepared_bytes: int
    note: str = ""
    activations: str = ""
    scratch_bytes: int = 0
    rank_if_fits: int | None = None

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
