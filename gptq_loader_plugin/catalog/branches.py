"""List a repository's branches as its model card does, and say which fit this machine.

Of a branch's weights only the headers are read, by range. A branch that cannot be read keeps its
line, with what the card and its name tell.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.catalog.card_table import CardRow, read_branch_name, read_card_table
from gptq_loader_plugin.catalog.fit import Fit
from gptq_loader_plugin.catalog.remote_branch import (
    FACTS,
    BranchContents,
    FitQuestion,
    inspect_branch,
)
from gptq_loader_plugin.errors import DownloadCancelled
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.hub.cache import cached_folder
from gptq_loader_plugin.hub.error_messages import explained
from gptq_loader_plugin.hub.fetch import LOOK_UP_LIMIT, free_bytes
from gptq_loader_plugin.hub.remote import list_names, look_up, read
from gptq_loader_plugin.hub.workers import Cancelled, run_jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_plugin.catalog.engines.engine import Answer
    from gptq_loader_plugin.catalog.exllama import ExllamaReport
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.hub.hub_reference import HubReference
    from gptq_loader_plugin.hub.workers import Stop
    from gptq_loader_plugin.kernel import Kernel

__all__ = ["BranchReport", "RepoReport", "list_branches"]

WORKERS = 4  # branches at a time: few enough for a hub to take it kindly


@dataclass(frozen=True, slots=True)
class BranchReport:
    """One branch; None where nothing tells.

    Attributes:
        branch: its name.
        commit: the commit it is at.
        is_gptq: whether it is a GPTQ checkpoint.
        bits: the width of most layers' codes.
        group_size: input rows that share a scale, or -1.
        desc_act: act-order.
        damp_percent: the damping GPTQ used.
        dataset: what it was calibrated on.
        seq_len: the tokens of a calibration sample.
        size_bytes: its weights.
        download_bytes: all that a download fetches.
        exllama: whether ExLlama could run it.
        engines: which other programs take it, and why the rest do not.
        desc: the card's words.
        fit: whether it fits this machine.
        here: whether it is on this machine.
        sources: where each fact came from.
        warnings: what a user should know.
        error: why it could not be read, or what else it is.
    """

    branch: str
    commit: str
    is_gptq: bool | None = None
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    damp_percent: float | None = None
    dataset: str | None = None
    seq_len: int | None = None
    size_bytes: int | None = None
    download_bytes: int | None = None
    exllama: ExllamaReport | None = None
    engines: tuple[Answer, ...] = ()
    desc: str | None = None
    fit: Fit = field(default_factory=lambda: Fit(fits=None, reason="it could not be read"))
    here: bool = False
    sources: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class RepoReport:
    """A repository's branches.

    Attributes:
        repo: "owner/name".
        license: what its model card says, or "".
        gated: whether its owner lets people in one by one.
        device: where they would run.
        context: the tokens of context to keep room for.
        free_bytes: the bytes free on the cache's disk.
        branches: main first, then in the order of the card.
        warnings: what a user should know.
    """

    repo: str
    license: str
    gated: bool
    device: str
    context: int
    free_bytes: int
    branches: tuple[BranchReport, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, for `branches --json`."""
        return asdict(self)


def list_branches(
    hub: HubReference,
    *,
    device: Device,
    kernels: Sequence[Kernel],
    context: int = 4096,
    alone: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> RepoReport:
    """List a repository's branches.

    Args:
        hub: the repository.
        device: where they would run.
        kernels: the kernels to ask.
        context: the tokens of context to keep room for.
        alone: whether to list the branch that `hub` names alone.
        progress: called with how many branches are read.
        cancelled: asked all the time; once it says yes this ends.

    Raises:
        CheckpointNotFound: there is no such repository or branch.
        DownloadCancelled: `cancelled` said yes.
        HubError: the hub could not be reached, or refused.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    question = FitQuestion(device, kernels, context, cache)
    try:
        names = run_jobs(
            [partial(_names, hub, alone=alone)], workers=1, cancelled=cancelled, limit=LOOK_UP_LIMIT
        )[0]
        contents, card, license_, warnings = _ask_all(hub, names, question, progress, cancelled)
    except Cancelled:
        raise DownloadCancelled(f"the list of {hub.repo} was stopped", hint="ask again") from None
    except Exception as error:
        raise explained(hub, error) from error
    order = {name: at for at, name in enumerate(dict.fromkeys(("main", *card)))}
    reports = [
        _report(replace(hub, branch=name), names[name], contents[name], card.get(name))
        for name in names
    ]
    reports.sort(key=lambda report: (order.get(report.branch, len(order)), report.branch))
    return RepoReport(
        repo=hub.repo,
        license=license_,
        gated=any(branch.remote.gated for branch in contents.values() if branch.remote),
        device=str(device),
        context=context,
        free_bytes=free_bytes(cache),
        branches=tuple(reports),
        warnings=warnings,
    )


def _names(hub: HubReference, stop: Stop, *, alone: bool) -> dict[str, str]:
    """List the branches to read, each with its commit."""
    if alone:
        return {hub.branch: look_up(hub, stop).commit}
    return list_names(hub.repo, stop)


def _ask_all(
    hub: HubReference,
    names: dict[str, str],
    question: FitQuestion,
    progress: Callable[[Progress], None] | None,
    cancelled: Callable[[], bool] | None,
) -> tuple[dict[str, BranchContents], dict[str, CardRow], str, tuple[str, ...]]:
    """Read every branch and the card, a few at a time; what fails is in its `Seen`."""
    contents: dict[str, BranchContents] = {}
    reported = -1

    def on_poll() -> None:
        nonlocal reported
        if progress is not None and reported != (reported := len(contents)):
            progress(Progress("branches", reported, len(names), "branches", hub.repo))

    def branch(name: str, stop: Stop) -> None:
        contents[name] = inspect_branch(replace(hub, branch=name), question, stop)

    card: dict[str, CardRow] = {}
    licenses: list[str] = []
    warnings: list[str] = []

    def read_card(stop: Stop) -> None:
        try:
            remote = look_up(replace(hub, branch="main"), stop)
            licenses.append(remote.license)
            file = remote.file("README.md")
            if file is not None:
                card.update(read_card_table(read(file, stop).decode("utf-8", errors="replace")))
        except Cancelled:
            raise
        except Exception as error:  # noqa: BLE001 - the branches tell most of what the card does
            told = explained(hub, error)
            warnings.append(f"the model card cannot be read: {told.message}; {told.hint}")

    jobs: list[Callable[[Stop], None]] = [read_card, *(partial(branch, name) for name in names)]
    run_jobs(
        jobs,
        workers=WORKERS,
        cancelled=cancelled,
        on_poll=on_poll,
    )
    return contents, card, licenses[0] if licenses else "", tuple(warnings)


def _report(
    hub: HubReference, commit: str, contents: BranchContents, card: CardRow | None
) -> BranchReport:
    """Put together what the branch, the card and the name tell; the branch itself wins."""
    facts, sources = (
        dict(contents.facts),
        {fact: contents.sources.get(fact, "") for fact in contents.facts},
    )
    warnings = []
    for row, source in ((card, "model card"), (read_branch_name(hub.branch), "branch name")):
        for fact in FACTS:
            value = getattr(row, fact, None)
            if value is None:
                continue
            if fact not in facts:
                facts[fact], sources[fact] = value, source
            elif facts[fact] != value and fact in ("bits", "group_size", "desc_act"):
                warnings.append(f"the {source} says {_fact(fact, value)}, and it is not so")
    remote = contents.remote
    return BranchReport(
        branch=hub.branch,
        commit=commit,
        is_gptq=contents.is_gptq,
        **(facts if contents.is_gptq is not False else {}),
        size_bytes=sum(weight_file.size for weight_file in remote.weight_files) if remote else None,
        download_bytes=remote.size if remote else None,
        exllama=contents.exllama,
        engines=contents.engines,
        desc=card.desc if card else None,
        fit=contents.fit or Fit(fits=None, reason=contents.error or "it could not be read"),
        here=cached_folder(replace(hub, branch=commit)) is not None,
        sources={field: source for field, source in sources.items() if source},
        warnings=tuple(warnings),
        error=contents.error,
    )


def _fact(name: str, value: object) -> str:
    if name == "bits":
        return f"{value}-bit"
    if name == "group_size":
        return "no groups" if value == -1 else f"groups of {value}"
    return "act-order" if value else "no act-order"
