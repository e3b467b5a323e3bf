"""How to quantise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["QuantizeOptions"]


class QuantizeOptions(BaseModel):
    """How to quantise a model.

    Attributes:
        bits: the width of a code.
        group_size: input rows that share a scale; -1 for one group a layer.
        order: which rows are quantised first. "static": those with the largest activations, the
            groups' scales found beforehand; "group-aware": one group after the other, sorted
            within; "act": act-order, rows in groups as they are sorted, which few engines still
            read; "none": as they lie. All but "act" leave groups as they lie, `desc_act: false`.
        sym: one zero in the middle; else each group has its own.
        damp_percent: this share of the Hessian's mean diagonal is added to it.
        effort: "fast" is GPTQ alone; "standard" improves scales and codes afterwards, and tunes
            the scales of all layers together where the model fits into memory; "best" tunes codes
            and scales of each block together in between.
        true_sequential: within a block, let later layers see earlier ones quantised.
        checkpoint_format: "gptq" stores zeros minus one; "gptq_v2" stores them as they are. By
            default "gptq" where zeros are symmetric, which every loader reads, else "gptq_v2":
            GPTQModel refuses asymmetric "gptq" files of other writers.
        samples: the most calibration samples.
        seq_len: tokens of a sample, cut to the model's context.
        stride: tokens from one sample's start to the next one's; None spreads them over the text.
        offset: tokens before the first sample.
        size: how large the checkpoint may be, as bits a quantised weight ("3.5bpw") or as bytes of
            all weight files ("4GB"); each layer then gets the bits and groups that serve the whole
            best, in place of `bits` and `group_size`.
        widths: the bits to choose from for `size`.
        shard_bytes: the most bytes of a weight file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 128
    order: Literal["static", "group-aware", "act", "none"] = "static"
    effort: Literal["fast", "standard", "best"] = "standard"
    sym: bool = True
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.01
    true_sequential: bool = True
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    samples: Annotated[int, Field(ge=1)] = 128
    seq_len: Annotated[int, Field(ge=8)] = 2048
    stride: Annotated[int, Field(ge=1)] | None = None
    offset: Annotated[int, Field(ge=0)] = 0
    size: str | None = None
    widths: Annotated[tuple[Literal[2, 3, 4, 8], ...], Field(min_length=1)] = (2, 3, 4, 8)
    shard_bytes: Annotated[int, Field(ge=1)] = 5_000_000_000

    @property
    def desc_act(self) -> bool:
        """Whether rows lie in groups as they are sorted: what a file calls `desc_act`."""
        return self.order == "act"

    @model_validator(mode="before")
    @classmethod
    def _format_that_others_read(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("checkpoint_format") is not None:
            return data
        return {**data, "checkpoint_format": "gptq" if data.get("sym", True) else "gptq_v2"}

    @field_validator("group_size")
    @classmethod
    def _group_size_is_possible(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("must be positive, or -1 for none")
        return value
