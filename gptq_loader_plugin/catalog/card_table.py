"""Read the table of branches that a model card has, and what a branch's own name tells."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["CardRow", "read_branch_name", "read_card_table"]

LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
MARKS = re.compile(r"[*`]+|\\(?=_)")  # bold, code, and what keeps an underscore from being bold
RULE = re.compile(r"\|?(\s*:?-+:?\s*\|)+\s*(:?-+:?\s*)?")
# gptq-4bit-32g-actorder_True, gptq-3bit--1g-actorder_True
BRANCH_NAME = re.compile(
    r"gptq-(?P<bits>\d)-?bits?-(?P<group>-?\d+)g(?:-actorder_(?P<order>True|False))?",
    re.IGNORECASE,
)
COLUMNS = {
    "branch": "branch",
    "bits": "bits",
    "gs": "group_size",
    "group size": "group_size",
    "act order": "desc_act",
    "act-order": "desc_act",
    "damp %": "damp_percent",
    "gptq dataset": "dataset",
    "dataset": "dataset",
    "seq len": "seq_len",
    "size": "size",
    "exllama": "exllama",
    "desc": "desc",
    "description": "desc",
}


@dataclass(frozen=True, slots=True)
class CardRow:
    """What a card says of a branch; None where it says nothing that can be read.

    Attributes:
        branch: its name.
        bits: the width of a code.
        group_size: rows of a group, or -1 for none.
        desc_act: act-order.
        damp_percent: the damping GPTQ used.
        dataset: what it was calibrated on.
        seq_len: the tokens of a calibration sample.
        desc: the card's words.
    """

    branch: str
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    damp_percent: float | None = None
    dataset: str | None = None
    seq_len: int | None = None
    desc: str | None = None


def read_card_table(card: str) -> dict[str, CardRow]:
    """Find a card's table of branches; a card without one gives none."""
    for header, rows in _tables(card.splitlines()):
        names = [COLUMNS.get(_plain(cell).lower(), "") for cell in header]
        if not {"branch", "bits"} <= set(names):
            continue
        parsed = [
            _row(dict(zip(names, map(_plain, row), strict=False))) for row in rows if any(row)
        ]
        return {row.branch: row for row in parsed if row.branch}
    return {}


def read_branch_name(branch: str) -> CardRow:
    """Read what a branch's name tells, as most publishers of 2023 wrote them."""
    match = BRANCH_NAME.search(branch)
    if match is None:
        return CardRow(branch)
    order = match["order"]
    return CardRow(
        branch,
        bits=int(match["bits"]),
        group_size=int(match["group"]),
        desc_act=None if order is None else order.lower() == "true",
    )


def _tables(lines: Sequence[str]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Return every table: its header's cells, and its rows' cells."""
    for at, line in enumerate(lines[1:], start=1):
        if not RULE.fullmatch(line.strip()) or "|" not in lines[at - 1]:
            continue
        rows = []
        for row in lines[at + 1 :]:
            if "|" not in row:
                break
            rows.append(_cells(row))
        yield _cells(lines[at - 1]), rows


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", inner)]


def _plain(cell: str) -> str:
    """Take the words of a cell out of links, and out of bold and code."""
    return MARKS.sub("", LINK.sub(r"\1", cell)).strip()


def _row(cells: dict[str, str]) -> CardRow:
    group = cells.get("group_size", "").lower()
    order = cells.get("desc_act", "").lower()
    return CardRow(
        branch=cells.get("branch", ""),
        bits=_whole(cells.get("bits", "")),
        group_size=-1 if group in ("none", "-1") else _whole(group.removesuffix("g")),
        desc_act={"yes": True, "true": True, "no": False, "false": False}.get(order),
        damp_percent=_number(cells.get("damp_percent", "")),
        dataset=cells.get("dataset") or None,
        seq_len=_whole(cells.get("seq_len", "")),
        desc=cells.get("desc") or None,
    )


def _whole(text: str) -> int | None:
    digits = text.replace(",", "")
    return int(digits) if digits.isdigit() else None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
