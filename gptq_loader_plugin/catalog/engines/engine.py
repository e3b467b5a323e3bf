"""What an engine asks of a GPTQ checkpoint, as data, and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OURS", "Answer", "Engine", "Order", "Zeros", "engines_of"]

OURS = "gptq-loader"

Order = Literal["read", "by config", "ignored", "without groups", "static", "never"]
Zeros = Literal["ignored", "labelled", "v1", "v2"]


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine, by what it takes.

    Attributes:
        name: as its project is called.
        version: the version, or range of versions, that this holds for.
        date: the day its code was read.
        source: where in its code this stands.
        refusal: why it takes no GPTQ checkpoint at all; "" where it takes some.
        note: what a user of it must know, where it takes one.
        configs: the files it reads the quantization config from, the first that is there; none
            where it looks at tensors alone.
        keys: what that config must say.
        refused_keys: what that config must not say.
        method: whether the config must name the method gptq.
        dynamic: whether it follows `dynamic`, settings for single modules.
        file_names: a regular expression of the weight files it opens.
        bits: the widths it takes.
        asym_bits: the widths it takes with asymmetric zeros, () for none; None for all it takes.
        order: what it makes of act-order: it reads g_idx; reads it where the config says act-order;
            passes over it; takes act-order without groups, where it changes nothing; only with
            static groups; or refuses whatever says act-order.
        g_idx: whether every layer must have its g_idx.
        without_g_idx: what it makes of layers that lack it is not known.
        groups: the group sizes it takes, -1 for none; None where it takes any.
        no_groups: whether it takes layers without groups.
        uneven_bits: the widths at which the last group may be short; None for all.
        power_of_two_groups: whether a group must have a power of two of rows, 32 or more.
        formats: the checkpoint formats it reads; None where it takes all for gptq.
        zeros: whose word it takes for how zeros are stored: it multiplies without them, by the
            config's format, or always as this format has them.
        sym_zeros: whether it reads them where they are symmetric, too.
        row_unit: what the rows of each layer must be a multiple of.
        column_unit: what the columns of each layer must be a multiple of.
        block_rows: what rows without groups must be a multiple of, where there are more.
        experts_alone: whether it takes this for the experts of a mixture alone.
    """

    name: str
    version: str
    date: str
    source: str
    refusal: str = ""
    note: str = ""
    configs: tuple[str, ...] = ("config.json",)
    keys: tuple[str, ...] = ()
    refused_keys: tuple[str, ...] = ()
    method: bool = True
    dynamic: bool = True
    file_names: str = r".+\.safetensors"
    bits: tuple[int, ...] = ()
    asym_bits: tuple[int, ...] | None = None
    order: Order = "read"
    g_idx: bool = False
    without_g_idx: bool = False
    groups: tuple[int, ...] | None = None
    no_groups: bool = True
    uneven_bits: tuple[int, ...] | None = None
    power_of_two_groups: bool = False
    formats: tuple[str, ...] | None = ("gptq", "gptq_v2")
    zeros: Zeros = "labelled"
    sym_zeros: bool = True
    row_unit: int = 1
    column_unit: int = 1
    block_rows: int = 1
    experts_alone: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine makes of a checkpoint.

    Attributes:
        engine: its name.
        version: the version, or range of versions, that this holds for.
        takes: whether it loads the checkpoint and computes what it holds; None where that is not
            known.
        reason: why, in words.
        source: where in its code this stands.
        date: the day its code was read.
    """

    engine: str
    version: str
    takes: bool | None
    reason: str
    source: str
    date: str


def engines_of(answers: Sequence[Answer]) -> str:
    """Name the programs that take a checkpoint, ours left out: a table's column."""
    names = [it.engine for it in answers if it.takes and not it.engine.startswith(OURS)]
    return ", ".join(names) if names else "ours alone"
