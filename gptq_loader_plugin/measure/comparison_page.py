"""A comparison as one HTML file: its table, and a chart of bytes against divergence."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.measure.compare import Compared, Comparison

__all__ = ["COLUMNS", "comparison_page", "comparison_rows"]

COLUMNS = (
    "Model", "Bits", "Bytes", "Perplexity", "KL mean", "KL median", "KL p90", "Same top token",
    "Prompt, tokens/s", "Reply, tokens/s",
)  # fmt: skip
WIDTH, HEIGHT, MARGIN = 720, 360, 64
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1c1c1c; background: #fff }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ccc }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #161616 }
  th, td { border-color: #444 } svg text { fill: #eee } }
"""


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Lay out a comparison: a row a model, the reference first."""
    return [_row(model) for model in comparison.models]


def _row(model: Compared) -> tuple[str, ...]:
    rates = (model.prompt_rate, model.reply_rate)
    name = f"{model.name} (reference; its KL is the noise)" if model.is_reference else model.name
    it = model.divergence
    return (
        name,
        "-" if model.bits is None else str(model.bits),
        write_size(model.size_bytes),
        f"{model.perplexity:.3f}",
        *(("-",) * 4 if it is None else (
            f"{it.mean:.2g}", f"{it.median:.2g}", f"{it.p90:.2g}", f"{100 * it.top1:.1f} %",
        )),
        *("-" if rate is None else f"{rate:,.1f}" for rate in rates),
    )  # fmt: skip


def comparison_page(comparison: Comparison, *, text_name: str) -> str:
    """Return the page, which needs nothing else."""
    head = "".join(f"<th>{html.escape(it)}</th>" for it in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in comparison_rows(comparison)
    )
    words = (
        f"{html.escape(text_name)}, {comparison.windows} windows of {comparison.window_tokens} "
        f"tokens. KL is the Kullback-Leibler divergence from the reference's next-token "
        f"probabilities, in nats; below the reference's own, {comparison.noise.mean:.2g}, it says "
        "nothing."
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Comparison</title><style>{STYLE}</style><h1>Comparison</h1><p>{words}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{_chart(comparison)}</html>\n"
    )


def _chart(comparison: Comparison) -> str:
    """Draw bytes against mean divergence; the noise as a line."""
    points = [
        (it.size_bytes, it.divergence.mean, it.name)
        for it in comparison.models
        if not it.is_reference and it.divergence is not None
    ]
    if not points:
        return ""
    widest = 1.08 * max(size for size, _, _ in points)
    highest = 1.15 * max(*(mean for _, mean, _ in points), comparison.noise.mean)
    circles = []
    for size, mean, name in points:
        x = MARGIN + size / widest * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - mean / highest * (HEIGHT - 2 * MARGIN)
        label = html.escape(name if len(name) <= 40 else f"…{name[-39:]}")
        anchor = "end" if x > WIDTH / 2 else "start"
        shift = -8 if x > WIDTH / 2 else 8
        circles.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#2563eb"><title>{html.escape(name)}: '
            f"{mean:.3g}</title></circle>"
            f'<text x="{x + shift:.1f}" y="{y - 8:.1f}" text-anchor="{anchor}">{label}</text>'
        )
    floor = HEIGHT - MARGIN - comparison.noise.mean / highest * (HEIGHT - 2 * MARGIN)
    axes = (
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" '
        'stroke="#888"/>'
        f'<path d="M{MARGIN} {floor:.1f}H{WIDTH - MARGIN}" stroke="#888" stroke-dasharray="4 4"/>'
        f'<text x="{WIDTH - MARGIN}" y="{floor - 4:.1f}" text-anchor="end">noise</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 36}" text-anchor="end">bytes, up to '
        f"{write_size(int(widest))}</text>"
        f'<text x="{MARGIN}" y="{MARGIN - 12}">mean KL, up to {highest:.2g}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Bytes against mean KL '
        f'divergence">{axes}{"".join(circles)}</svg>'
    )
