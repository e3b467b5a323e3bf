"""Draw how far two models are apart: the table of `gptq-loader compare`, and bars."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio.views.chart import text_title
from gptq_loader_plugin.measure.comparison_page import COLUMNS, comparison_rows

if TYPE_CHECKING:
    from gptq_loader_plugin.measure.compare import Comparison
    from gptq_loader_plugin.measure.divergence import Divergence

__all__ = ["comparison_html"]

ROW, BAR = 34, 10  # pixels


def comparison_html(comparison: Comparison) -> str:
    """Draw a comparison of two models: what it says, its bars, and the table of the command."""
    reference, other = comparison.models[0], comparison.models[-1]
    if other.divergence is None:
        return _table(comparison)
    return (
        f"<figure class='chart'><figcaption>How far {escape(other.name)} is from "
        f"{escape(reference.name)}: KL divergence in nats a token</figcaption>"
        f"{_bars(other.divergence, comparison.noise)}"
        f"<p>{escape(_summary(other.divergence, comparison.noise))} Measured on "
        f"{escape(text_title(comparison.measured[0].text))}.</p></figure>{_table(comparison)}"
    )


def _summary(divergence: Divergence, noise: Divergence) -> str:
    same = f"Both have the same likeliest token in {divergence.top1:.1%} of the places."
    if divergence.mean <= noise.mean:
        return f"They differ by no more than rounding makes. {same}"
    if not noise.mean:
        return same
    times = divergence.mean / noise.mean
    often = f"{times:,.0f}" if times >= 10 else f"{times:.1f}"
    return f"They differ {often} times as much as rounding makes. {same}"


def _bars(divergence: Divergence, noise: Divergence) -> str:
    """Draw the divergence and the noise floor as bars over powers of ten."""
    rows = (
        ("noise floor", noise.mean, "noise"),
        ("median", divergence.median, ""),
        ("mean", divergence.mean, ""),
        ("90th percentile", divergence.p90, ""),
    )
    positive = [value for _, value, _ in rows if value > 0]
    if not positive:
        return ""
    low = math.floor(math.log10(min(positive))) - 1  # so that the least has a bar, too
    high = math.ceil(math.log10(max(positive)) + 1e-9)
    span = high - low
    grid = "".join(
        f"<line x1='{_percent((power - low) / span)}' x2='{_percent((power - low) / span)}' y1='0' "
        f"y2='100%'/><text x='{_percent((power - low) / span)}' y='100%' dy='18' "
        f"text-anchor='middle'>{10.0**power:g}</text>"
        for power in range(low + 1, high, max(1, span // 5))
    )
    bars = "".join(
        f"<g class='bar {kind}'><text x='2' y='{at * ROW + 14}'>{label}: {value:.2g}</text>"
        f"<rect x='0' y='{at * ROW + 19}' height='{BAR}' rx='2' "
        f"width='{_percent(_share(value, low, span))}'/></g>"
        for at, (label, value, kind) in enumerate(rows)
    )
    words = ", ".join(f"{label} {value:.2g}" for label, value, _ in rows)
    return (
        f"<div class='bars'><svg role='img' width='100%' height='{len(rows) * ROW}' "
        f"aria-label='{escape(words)}'><g class='grid'>{grid}</g>{bars}</svg></div>"
    )


def _share(value: float, low: int, span: int) -> float:
    return max(0.0, (math.log10(value) - low) / span) if value > 0 else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in COLUMNS)
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in comparison_rows(comparison)
    )
    return (
        "<div class='scrolls'><table aria-label='Comparison'>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
