"""Draw the measurements: perplexity over size, with a mark for each checkpoint."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptq_loader_plugin.measure.results import Measured, MeasuredText

__all__ = ["chart_html", "text_title"]

# A mark's shape shows the bits too, for those who do not see its colour.
SHAPES = {
    2: "M0-7 7 0 0 7-7 0z",
    3: "M0-7 7 6-7 6z",
    4: "M-6 0a6 6 0 1 0 12 0 6 6 0 1 0-12 0z",
    8: "M-6-6h12v12h-12z",
}
OTHER_SHAPE = "M-7-3h4v-4h6v4h4v6h-4v4h-6v-4h-4z"
MARGIN = 0.14  # of the span of an axis, left free at both ends, so that no mark is cut off
MIN_MARGIN = 0.02  # of the largest value: what differs by less than that looks the same
# Pixels: the plot on a phone and in a window, in which labels must not cover each other.
NARROW, WIDE, HEIGHT = 290, 560, 260
LETTER, LINE, MARK = 6.4, 14, 9
TICKS = 5


def chart_html(figures: Sequence[Measured]) -> str:
    """Draw the figures of one text: a chart, and the table with the same content."""
    if not figures:
        return (
            "<p class='empty'>Nothing is measured yet. <b>Measure</b> runs on the models above, "
            "one after the other; <code>gptq-loader perplexity</code> adds to this too.</p>"
        )
    ranked = sorted(figures, key=lambda figure: (figure.perplexity, figure.size_bytes))
    return _chart(ranked) + _table(ranked)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to a share of the plot.

    Attributes:
        low: the value at its beginning.
        high: the value at its end.
    """

    low: float
    high: float

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> Iterator[float]:
        """Yield round values, at most TICKS or so."""
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            yield i * step


def _axis(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    margin = max((high - low) * MARGIN, high * MIN_MARGIN) or 1.0
    return _Axis(max(0.0, low - margin), high + margin)


def _chart(ranked: Sequence[Measured]) -> str:
    x_axis = _axis([figure.size_bytes for figure in ranked])
    y_axis = _axis([figure.perplexity for figure in ranked])
    at = {
        figure.path: (x_axis.share(figure.size_bytes), 1 - y_axis.share(figure.perplexity))
        for figure in ranked
    }
    grid = "".join(
        f"<line x1='0' x2='100%' y1='{y}' y2='{y}'/>"
        f"<text x='-8' y='{y}' dy='4' text-anchor='end'>{tick:,.5g}</text>"
        for tick in y_axis.ticks()
        for y in [_percent(1 - y_axis.share(tick))]
    )
    sizes = "".join(
        f"<text x='{_percent(x_axis.share(tick))}' y='100%' dy='18' text-anchor='middle'>"
        f"{write_size(round(tick))}</text>"
        for tick in x_axis.ticks()
    )
    front = _front(ranked)
    steps = "".join(
        f"<line class='front' x1='{_percent(at[a.path][0])}' y1='{_percent(at[a.path][1])}' "
        f"x2='{_percent(at[b.path][0])}' y2='{_percent(at[b.path][1])}'/>"
        for a, b in itertools.pairwise(front)
    )
    labels = _labels(ranked)
    places = _places([(at[figure.path], labels[figure.path]) for figure in ranked])
    marks = "".join(
        _mark(figure, at[figure.path], labels[figure.path], place)
        for figure, place in zip(ranked, places, strict=True)
    )
    kinds = "".join(
        f"<li class='bits-{bits}'><svg viewBox='-8 -8 16 16'><path d='{_shape(bits)}'/></svg>"
        f"{bits}-bit</li>"
        for bits in sorted({figure.bits for figure in ranked})
    )
    front_key = "<li><i></i>best at its size</li>" if len(front) > 1 else ""
    return (
        f"<figure class='chart'><figcaption>Perplexity (lower is better) over size on disk"
        f"</figcaption><div class='plot'><svg role='img' width='100%' height='100%' "
        f"aria-label='{escape(_summary(ranked))}'><g class='grid'>{grid}{sizes}</g>{steps}{marks}"
        f"</svg></div><ul>{kinds}{front_key}</ul><p>{escape(_summary(ranked))} "
        f"Measured on {escape(text_title(ranked[0].text))}.</p></figure>"
    )


def _mark(figure: Measured, at: tuple[float, float], label: str, place: tuple[str, str]) -> str:
    offset, kind = place
    facts = f"{figure.bits}-bit, {_groups(figure)}, {write_size(figure.size_bytes)}"
    title = f"{figure.name}: {facts}, perplexity {figure.perplexity:.3f}"
    return (
        f"<svg class='mark bits-{figure.bits}' x='{_percent(at[0])}' y='{_percent(at[1])}' "
        f"overflow='visible'><title>{escape(title)}</title>"
        f"<path d='{_shape(figure.bits)}'/>"
        f"<text class='{kind}' {offset}>{escape(label)}</text></svg>"
    )


# Where a label may stand beside its mark: its attributes; what share of it lies left of its anchor,
# and the anchor, in pixels from the mark.
SIDES = (
    ("x='11' y='4'", 0.0, 11, -10),
    ("x='-11' y='4' text-anchor='end'", 1.0, -11, -10),
    ("y='-12' text-anchor='middle'", 0.5, 0, -24),
    ("y='22' text-anchor='middle'", 0.5, 0, 10),
)
Box = tuple[float, float, float, float]


def _places(marks: Sequence[tuple[tuple[float, float], str]]) -> list[tuple[str, str]]:
    """Choose for each label a side where it covers nothing; one without such a side is hidden.

    A label that fits only on a wide plot is shown only there.
    """
    placed: dict[int, tuple[int, str]] = {}
    for width, kind in ((NARROW, ""), (WIDE, "wide")):
        spots = [((x * width, y * HEIGHT), len(label) * LETTER) for (x, y), label in marks]
        points = [(x - MARK, y - MARK, x + MARK, y + MARK) for (x, y), _ in spots]
        occupied = {at: _box(spots[at], side) for at, (side, _) in placed.items()}
        for at in range(len(marks)):
            if at in placed:
                continue
            others = [*(point for i, point in enumerate(points) if i != at), *occupied.values()]
            boxes = [_box(spots[at], side) for side in range(len(SIDES))]
            free = [side for side, box in enumerate(boxes) if _is_free(box, others, width)]
            if free:
                placed[at], occupied[at] = (free[0], kind), boxes[free[0]]
    return [
        (SIDES[placed[at][0]][0], placed[at][1]) if at in placed else ("", "hidden")
        for at in range(len(marks))
    ]


def _box(spot: tuple[tuple[float, float], float], side: int) -> Box:
    """Return the box of a label on one side of its mark."""
    (x, y), length = spot
    _, before, right, down = SIDES[side]
    left, top = x + right - before * length, y + down
    return left, top, left + length, top + LINE


def _is_free(box: Box, others: Sequence[Box], width: float) -> bool:
    left, top, right, bottom = box
    inside = left >= 0 and right <= width and top >= 0 and bottom <= HEIGHT
    return inside and not any(_overlap(box, other) for other in others)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _front(ranked: Sequence[Measured]) -> list[Measured]:
    """Return those that no other beats in both size and perplexity, the smallest first."""
    front: list[Measured] = []
    for figure in sorted(ranked, key=lambda figure: (figure.size_bytes, figure.perplexity)):
        if not front or figure.perplexity < front[-1].perplexity:
            front.append(figure)
    return front


def _summary(ranked: Sequence[Measured]) -> str:
    best, smallest = ranked[0], min(ranked, key=lambda figure: figure.size_bytes)
    text = f"{best.name} predicts best: {best.perplexity:.2f} at {write_size(best.size_bytes)}."
    if smallest is best:
        return text
    return (
        f"{text} The smallest is {smallest.name}: {smallest.perplexity:.2f} "
        f"({_increase(smallest, best)}) at {write_size(smallest.size_bytes)}."
    )


def _table(ranked: Sequence[Measured]) -> str:
    columns = ("Checkpoint", "Perplexity", "", "Size", "Bits", "Groups", "Act order", "Kernel")
    head = "".join(f"<th scope='col'>{column}</th>" for column in columns)
    best = ranked[0]
    rows = "".join(
        f"<tr><th scope='row'>{escape(figure.name)}</th><td>{figure.perplexity:.3f}</td>"
        f"<td>{_increase(figure, best)}</td>"
        f"<td>{write_size(figure.size_bytes)}</td><td>{figure.bits}</td><td>{_group(figure)}</td>"
        f"<td>{'yes' if figure.desc_act else 'no'}</td>"
        f"<td>{escape(', '.join(figure.kernels))}</td></tr>"
        for figure in ranked
    )
    return (
        "<div class='scrolls'><table aria-label='Measurements'>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _increase(figure: Measured, best: Measured) -> str:
    if figure.perplexity == best.perplexity:
        return "best"
    return f"{figure.perplexity / best.perplexity - 1:+.1%}"


def text_title(text: MeasuredText) -> str:
    """Return a text's name, and how it was cut into windows."""
    return f"{text.name}, {text.windows:,} windows of {text.window_tokens:,} tokens"


def _labels(figures: Sequence[Measured]) -> dict[str, str]:
    """Label each by its bits and groups; by its name where others have the same."""
    short = {}
    for figure in figures:
        groups = "no groups" if figure.group_size < 0 else f"{figure.group_size}g"
        short[figure.path] = f"{figure.bits}-bit {groups}"
    uses = Counter(short.values())
    for figure in figures:
        if uses[short[figure.path]] > 1:
            short[figure.path] = figure.name.rpartition("/")[2]
    return short


def _group(figure: Measured) -> str:
    return "none" if figure.group_size < 0 else str(figure.group_size)


def _groups(figure: Measured) -> str:
    return "no groups" if figure.group_size < 0 else f"groups of {figure.group_size}"


def _shape(bits: int) -> str:
    return SHAPES.get(bits, OTHER_SHAPE)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
