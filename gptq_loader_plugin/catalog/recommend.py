"""Recommend one branch of a repository: the most exact of those that fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.catalog.engines.engine import engines_of
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.catalog.branches import BranchReport, RepoReport

__all__ = ["Recommendation", "recommend"]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Which branch to take.

    Attributes:
        branch: its name, or None where none fits.
        reason: why this one, in words.
    """

    branch: str | None
    reason: str


def recommend(report: RepoReport) -> Recommendation:
    """Recommend the branch that loses least to quantisation of those that fit the report's device.

    More bits are more exact, then smaller groups, then act-order, as model cards say it and our
    own measurements have it (docs/benchmarks.md).
    """
    read = [branch for branch in report.branches if branch.fit.weight_bytes is not None]
    fitting = [branch for branch in read if branch.fit.fits]
    if not fitting:
        return Recommendation(None, _none_fits(report, read))
    best = min(fitting, key=_loss)
    reason = f"{_facts(best)}: the most exact of the {len(fitting)} that fit, with {_needs(best)}"
    if len(fitting) == 1:
        reason = f"{_facts(best)}: the only one that fits, with {_needs(best)}"
    smallest = min(fitting, key=_taken)
    if _taken(smallest) < _taken(best):
        reason += (
            f"; {smallest.branch} leaves {write_size(_taken(best) - _taken(smallest))} more for "
            "context"
        )
    return Recommendation(
        best.branch, f"{reason}. Beside ours it runs in: {engines_of(best.engines)}"
    )


def _loss(branch: BranchReport) -> tuple[int, int, bool, int]:
    """Return what orders branches from the most exact on."""
    group = branch.group_size if branch.group_size and branch.group_size > 0 else 1 << 30
    return (-(branch.bits or 0), group, not branch.desc_act, _taken(branch))


def _taken(branch: BranchReport) -> int:
    return (branch.fit.weight_bytes or 0) + (branch.fit.kv_bytes or 0)


def _facts(branch: BranchReport) -> str:
    groups = branch.group_size if branch.group_size and branch.group_size > 0 else None
    return f"{branch.bits}-bit, " + (f"groups of {groups}" if groups else "no groups")


def _needs(branch: BranchReport) -> str:
    return (
        f"{write_size(branch.fit.weight_bytes or 0)} of weights and "
        f"{write_size(branch.fit.kv_bytes or 0)} for {branch.fit.context or 0:,} tokens"
    )


def _none_fits(report: RepoReport, read: list[BranchReport]) -> str:
    if not read:
        return "no branch could be read"
    smallest = min(read, key=_taken)
    return f"none fits {report.device}; the smallest, {smallest.branch}: {smallest.fit.reason}"
