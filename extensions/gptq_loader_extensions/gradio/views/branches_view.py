"""Show a repository's branches as its model card does, and which of them fit this machine."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.catalog.branches import BranchReport, RepoReport

__all__ = ["branches_html"]

COLUMNS = (
    "Branch",
    "Bits",
    "GS",
    "Act order",
    "Damp %",
    "Dataset",
    "Seq len",
    "Size",
    "ExLlama",
    "Fits",
)


def branches_html(report: RepoReport) -> str:
    """Draw the table."""
    head = "".join(f"<th scope='col'>{it}</th>" for it in COLUMNS)
    rows = "".join(_row(it) for it in report.branches)
    gated = "; gated: its owner lets people in" if report.gated else ""
    notes = "".join(f"<p role='note'>{escape(it)}</p>" for it in report.warnings)
    return (
        "<div class='scrolls'><table>"
        f"<caption>{escape(report.repo)}, licence {escape(report.license or 'not given')}{gated}; "
        f"{write_size(report.free_bytes)} of disk free</caption>"
        f"<thead><tr>{head}</tr></thead>{rows}</table></div>{notes}"
    )


def _row(it: BranchReport) -> str:
    """Draw a branch: a line of facts, and below it why it fits or does not."""
    groups = "-" if it.group_size is None else "none" if it.group_size < 0 else str(it.group_size)
    size = "-" if it.size_bytes is None else write_size(it.size_bytes)
    exllama = None if it.exllama is None else it.exllama.compatible
    why = it.error or it.fit.reason
    if it.exllama is not None and not it.exllama.compatible and not it.error:
        why += f"; ExLlama: {it.exllama.reason}"
    if it.here:
        why = f"on this machine; {why}"
    cells = [
        _text(it.bits),
        groups,
        _yes(it.desc_act),
        _text(it.damp_percent),
        escape(_text(it.dataset)),
        _text(it.seq_len),
        size,
        _yes(exllama),
        _yes(None if it.error else it.fit.fits),
    ]
    name = f"<th scope='row'>{escape(it.branch)}</th>"
    first = f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    second = f"<tr class='why'><td colspan='{len(COLUMNS)}'>{escape(why)}</td></tr>"
    return f"<tbody>{first}{second}</tbody>"


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _yes(value: bool | None) -> str:  # noqa: FBT001 - the value itself
    if value is None:
        return "-"
    return "<span class='yes'>yes</span>" if value else "<span class='no'>no</span>"
