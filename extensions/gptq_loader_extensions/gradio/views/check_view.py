"""Show whether a checkpoint is right, and which programs take it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.catalog.engines.engine import OURS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.catalog.engines.engine import Answer
    from gptq_loader_plugin.verify.report import Report

__all__ = ["engines_html", "report_html"]

# What was measured, in a person's words.
MEASURED = {
    "layers": "Quantised layers",
    "hashed": "Files whose hash is right",
    "largest_hidden": "Largest hidden state",
    "perplexity": "Perplexity of a page of English",
}
TAKES = {True: ("yes", "yes"), False: ("no", "no"), None: ("", "not known")}


def report_html(report: Report, name: str) -> str:
    """Draw what `verify` says: the verdict, what it found, and what it measured."""
    verdict = "is right" if report.right else "is wrong"
    seconds = sum(report.seconds.values())
    words = f"<p class='done'><b>{escape(name)} {verdict}.</b> Checked in {seconds:.0f} s.</p>"
    if not report.right:
        words = words.replace("<p class='done'>", '<p role="alert">', 1)
    return words + _findings(report) + _measured(report.facts)


def engines_html(answers: Sequence[Answer]) -> str:
    """Draw which programs take a checkpoint, and why the others do not."""
    rows = []
    for answer in answers:
        if answer.engine.startswith(f"{OURS}+"):
            continue
        kind, words = TAKES[answer.takes]
        rows.append(
            f"<tr><th scope='row'>{escape(answer.engine)}</th><td>{escape(answer.version)}</td>"
            f"<td class='{kind}'>{words}</td><td>{escape(answer.reason)}</td></tr>"
        )
    dates = max(answer.date for answer in answers if answer.engine != OURS)
    return (
        "<table><caption>Where else it runs</caption><thead><tr><th scope='col'>Program</th>"
        "<th scope='col'>Version</th><th scope='col'>Takes it</th><th scope='col'>Why</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
        f"<p role='note'>Rules of other programs as their code was on {escape(dates)}.</p>"
    )


def _findings(report: Report) -> str:
    rows = [
        f"<tr><th scope='row'>{'Wrong' if finding.wrong else 'Note'}: {escape(finding.check)}</th>"
        f"<td>{escape(finding.message)}</td><td>{escape(finding.fix)}</td></tr>"
        for finding in report.findings
    ]
    if not rows:
        return ""
    return (
        "<table><caption>What was found</caption><thead><tr><th scope='col'>Check</th>"
        "<th scope='col'>What</th><th scope='col'>What to do</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _measured(facts: dict[str, Any]) -> str:
    rows = [
        f"<tr><th scope='row'>{words}</th><td>{facts[name]:,}</td></tr>"
        for name, words in MEASURED.items()
        if facts.get(name)
    ]
    replies = "".join(
        f"<blockquote>{escape(reply)}</blockquote>" for reply in facts.get("replies", ())
    )
    return (
        "<table><caption>What was measured</caption><thead><tr><th scope='col'>What</th>"
        f"<th scope='col'>Value</th></tr></thead><tbody>{''.join(rows)}</tbody></table>{replies}"
    )
