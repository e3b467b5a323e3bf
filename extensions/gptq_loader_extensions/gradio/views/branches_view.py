"""Show a repository's branches as its model card does, and which of them fit this machine."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from gptq_loader_plugin.catalog.engines.engine import engines_of
from gptq_loader_plugin.catalog.recommend import recommend
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.catalog.branches import BranchReport, RepoReport

__all__ = ["branches_html"]

COLUMNS = (
    "Branch",
    "Bits",
    "Group size",
    "Act order",
    "Damp %",
    "Dataset",
    "Seq len",
    "Size",
    "ExLlama",
    "Fits",
    "Desc",
)


def branches_html(report: RepoReport) -> str:
    """Draw the table of a repository's branches."""
    head = "".join(f"<th scope='col'>{column}</th>" for column in COLUMNS)
    engines = {branch.engines for branch in report.branches if branch.engines and not branch.error}
    rows = "".join(
        _row(branch, report.repo, engines=len(engines) > 1) for branch in report.branches
    )
    gated = "; gated: its owner grants access" if report.gated else ""
    advice = recommend(report)
    words = f"Recommended: {advice.branch}. {advice.reason}" if advice.branch else advice.reason
    notes = f"<p class='advice'>{escape(words)}</p>"
    if len(engines) == 1:
        (common,) = engines
        notes += f"<p>Beside ours every branch runs in: {escape(engines_of(common))}</p>"
    notes += "".join(f"<p role='note'>{escape(warning)}</p>" for warning in report.warnings)
    return (
        f"<div class='scrolls' tabindex='0'><table data-repo='{escape(report.repo)}'>"
        f"<caption>{escape(report.repo)}, licence {escape(report.license or 'not given')}{gated}; "
        f"{write_size(report.free_bytes)} of disk free</caption>"
        f"<thead><tr>{head}</tr></thead>{rows}</table></div>{notes}"
    )


def _row(branch: BranchReport, repo: str, *, engines: bool) -> str:
    """Draw a branch: a line of facts, and below it why it fits or does not.

    Args:
        branch: the branch.
        repo: its repository.
        engines: whether to say what else runs it, where that is not the same for all of them.
    """
    groups = _text(branch.group_size)
    if branch.group_size is not None and branch.group_size < 0:
        groups = "none"
    size = "-" if branch.size_bytes is None else write_size(branch.size_bytes)
    why = branch.error or branch.fit.reason
    if branch.exllama is not None and not branch.exllama.compatible and not branch.error:
        why += f"; ExLlama: {branch.exllama.reason}"
    if engines and branch.engines and not branch.error:
        why += f"; beside ours it runs in: {engines_of(branch.engines)}"
    if branch.here:
        why = f"on this machine; {why}"
    cells = [
        _text(branch.bits),
        groups,
        _yes(branch.desc_act),
        _text(branch.damp_percent),
        escape(_text(branch.dataset)),
        _text(branch.seq_len),
        size,
        _exllama(branch),
        _yes(None if branch.error else branch.fit.fits),
        f"<span class='desc'>{escape(branch.desc or '')}</span>",
    ]
    chosen = escape(f"{repo}:{branch.branch}")
    name = (
        f"<th scope='row'><button type='button' data-branch='{chosen}' aria-pressed='false'>"
        f"{escape(branch.branch)}</button></th>"
    )
    first = f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    second = f"<tr class='why'><td colspan='{len(COLUMNS)}'><span>{escape(why)}</span></td></tr>"
    return f"<tbody>{first}{second}</tbody>"


def _exllama(branch: BranchReport) -> str:
    if branch.exllama is None:
        return "-"
    perhaps = branch.exllama.compatible is None
    return "perhaps" if perhaps else _yes(branch.exllama.compatible)


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _yes(value: bool | None) -> str:  # noqa: FBT001 - the value itself
    if value is None:
        return "-"
    return "<span class='yes'>yes</span>" if value else "<span class='no'>no</span>"
