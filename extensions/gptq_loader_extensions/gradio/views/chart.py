"""Draw what a person has measured: perplexity over size, a mark for each checkpoint."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptq_loader_plugin.measure.results import Measured, MeasuredText

__all__ = ["chart_html", "text_title"]

# A mark's shape says the bits too, for who does not see colours.
SHAPES = {
    2: "M0-7 7 0 0 7-7 0z",
    3: "M0-7 7 6-7 6z",
    4: "M-6 0a6 6 0 1 0 12 0 6 6 0 1 0-12 0z",
    8: "M-6-6h12v12h-12z",
}
OTHER_SHAPE = "M-7-3h4v-4h6v4h4v6h-4v4h-6v-4h-4z"
ROOM = 0.14  # of the span of an axis, left free at both ends, so that no mark is cut
LEAST_ROOM = 0.02  # of the largest value: what differs by less than that looks alike
# Pixels: a plot of a phone and of a window, in which labels must not lie over each other.
NARROW, WIDE, HEIGHT = 290, 560, 260
LETTER, LINE, MARK = 6.4, 14, 9
TICKS = 5


def chart_html(figures: Sequence[Measured]) -> str:
    """Draw the figures of one text: a picture, and the table that says the same."""
    if not figures:
        return (
            "<p class='empty'>Nothing is measured yet. <b>Measure</b> takes the models above, one "
            "after the other; <code>gptq-loader perplexity</code> adds to this too.</p>"
        )
    ranked = sorted(figures, key=lambda it: (it.perplexity, it.size_bytes))
    return _picture(ranked) + _table(ranked)


@dataclass(frozen=True, slots=True)
class _Axis:
    """From values to a share of the plot.

    Attributes:
        low: the value at its beginning.
        high: the value at its end.
    """

    low: float
    high: float

    def share(self, value: float) -> float:
        """Give where a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> Iterator[float]:
        """Give round values, at most TICKS or so."""
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(it * power for it in (1, 2, 5, 10) if it * power >= rough)
        for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            yield i * step


def _axis(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    room = max((high - low) * ROOM, high * LEAST_ROOM) or 1.0
    return _Axis(max(0.0, low - room), high + room)


def _picture(ranked: Sequence[Measured]) -> str:
    across = _axis([it.size_bytes for it in ranked])
    up = _axis([it.perplexity for it in ranked])
    at = {it.path: (across.share(it.size_bytes), 1 - up.share(it.perplexity)) for it in ranked}
    grid = "".join(
        f"<line x1='0' x2='100%' y1='{_percent(1 - up.share(it))}' "
        f"y2='{_percent(1 - up.share(it))}'/>"
        f"<text x='-8' y='{_percent(1 - up.share(it))}' dy='4' text-anchor='end'>{it:,.5g}</text>"
        for it in up.ticks()
    )
    sizes = "".join(
        f"<text x='{_percent(across.share(it))}' y='100%' dy='18' text-anchor='middle'>"
        f"{write_size(round(it))}</text>"
        for it in across.ticks()
    )
    front = _front(ranked)
    steps = "".join(
        f"<line class='front' x1='{_percent(at[a.path][0])}' y1='{_percent(at[a.path][1])}' "
        f"x2='{_percent(at[b.path][0])}' y2='{_percent(at[b.path][1])}'/>"
        for a, b in itertools.pairwise(front)
    )
    labels = _labels(ranked)
    places = _places([(at[it.path], labels[it.path]) for it in ranked])
    marks = "".join(
        _mark(it, at[it.path], labels[it.path], place)
        for it, place in zip(ranked, places, strict=True)
    )
    kinds = "".join(
        f"<li class='bits-{bits}'><svg viewBox='-8 -8 16 16'><path d='{_shape(bits)}'/></svg>"
        f"{bits}-bit</li>"
        for bits in sorted({it.bits for it in ranked})
    )
    lined = "<li><i></i>best at its size</li>" if len(front) > 1 else ""
    return (
        f"<figure class='chart'><figcaption>Perplexity (lower is better) over size on disk"
        f"</figcaption><div class='plot'><svg role='img' width='100%' height='100%' "
        f"aria-label='{escape(_in_words(ranked))}'><g class='grid'>{grid}{sizes}</g>{steps}{marks}"
        f"</svg></div><ul>{kinds}{lined}</ul><p>{escape(_in_words(ranked))} "
        f"Measured on {escape(text_title(ranked[0].text))}.</p></figure>"
    )


def _mark(it: Measured, at: tuple[float, float], label: str, place: tuple[str, str]) -> str:
    offset, kind = place
    told = f"{it.name}: {it.bits}-bit, {_groups(it)}, {write_size(it.size_bytes)}"
    return (
        f"<svg class='mark bits-{it.bits}' x='{_percent(at[0])}' y='{_percent(at[1])}' "
        f"overflow='visible'><title>{escape(told)}, perplexity {it.perplexity:.3f}</title>"
        f"<path d='{_shape(it.bits)}'/>"
        f"<text class='{kind}' {offset}>{escape(label)}</text></svg>"
    )


# Where a label may stand beside its mark: its attributes; how much of it lies left of the place,
# and the place, in pixels from the mark.
SIDES = (
    ("x='11' y='4'", 0.0, 11, -10),
    ("x='-11' y='4' text-anchor='end'", 1.0, -11, -10),
    ("y='-12' text-anchor='middle'", 0.5, 0, -24),
    ("y='22' text-anchor='middle'", 0.5, 0, 10),
)
Box = tuple[float, float, float, float]


def _places(marks: Sequence[tuple[tuple[float, float], str]]) -> list[tuple[str, str]]:
    """Choose for each label a side where it covers nothing; one without such a side is hidden.

    What finds room only on a wide plot is shown only there.
    """
    found: dict[int, tuple[int, str]] = {}
    for width, kind in ((NARROW, ""), (WIDE, "wide")):
        spots = [((x * width, y * HEIGHT), len(label) * LETTER) for (x, y), label in marks]
        points = [(x - MARK, y - MARK, x + MARK, y + MARK) for (x, y), _ in spots]
        taken = {at: _box(spots[at], side) for at, (side, _) in found.items()}
        for at in range(len(marks)):
            if at in found:
                continue
            others = [*(it for i, it in enumerate(points) if i != at), *taken.values()]
            boxes = [_box(spots[at], side) for side in range(len(SIDES))]
            free = [i for i, it in enumerate(boxes) if _is_free(it, others, width)]
            if free:
                found[at], taken[at] = (free[0], kind), boxes[free[0]]
    return [
        (SIDES[found[at][0]][0], found[at][1]) if at in found else ("", "hidden")
        for at in range(len(marks))
    ]


def _box(spot: tuple[tuple[float, float], float], side: int) -> Box:
    """Give the room that a label takes on one side of its mark."""
    (x, y), long = spot
    _, before, right, down = SIDES[side]
    left, top = x + right - before * long, y + down
    return left, top, left + long, top + LINE


def _is_free(box: Box, others: Sequence[Box], width: float) -> bool:
    left, top, right, bottom = box
    inside = left >= 0 and right <= width and top >= 0 and bottom <= HEIGHT
    return inside and not any(_overlap(box, it) for it in others)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _front(ranked: Sequence[Measured]) -> list[Measured]:
    """Find those that no other beats in both: the smallest first."""
    front: list[Measured] = []
    for it in sorted(ranked, key=lambda it: (it.size_bytes, it.perplexity)):
        if not front or it.perplexity < front[-1].perplexity:
            front.append(it)
    return front


def _in_words(ranked: Sequence[Measured]) -> str:
    best, least = ranked[0], min(ranked, key=lambda it: it.size_bytes)
    words = f"{best.name} predicts best: {best.perplexity:.2f} at {write_size(best.size_bytes)}."
    if least is best:
        return words
    more = least.perplexity / best.perplexity - 1
    return (
        f"{words} The smallest is {least.name}: {least.perplexity:.2f} ({more:+.1%}) at "
        f"{write_size(least.size_bytes)}."
    )


def _table(ranked: Sequence[Measured]) -> str:
    columns = ("Checkpoint", "Perplexity", "", "Size", "Bits", "Groups", "Act order", "Kernel")
    head = "".join(f"<th scope='col'>{it}</th>" for it in columns)
    best = ranked[0].perplexity
    rows = "".join(
        f"<tr><th scope='row'>{escape(it.name)}</th><td>{it.perplexity:.3f}</td>"
        f"<td>{'best' if it.perplexity == best else f'{it.perplexity / best - 1:+.1%}'}</td>"
        f"<td>{write_size(it.size_bytes)}</td><td>{it.bits}</td><td>{_group(it)}</td>"
        f"<td>{'yes' if it.desc_act else 'no'}</td>"
        f"<td>{escape(', '.join(it.kernels))}</td></tr>"
        for it in ranked
    )
    return (
        "<div class='scrolls'><table aria-label='What was measured'>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def text_title(text: MeasuredText) -> str:
    """Call a text by its name, and say how it was cut."""
    return f"{text.name}, {text.windows:,} windows of {text.window_tokens:,} tokens"


def _labels(figures: Sequence[Measured]) -> dict[str, str]:
    """Call each by its bits and groups; by its name where others have the same."""
    groups = {it.path: "no groups" if it.group_size < 0 else f"{it.group_size}g" for it in figures}
    short = {it.path: f"{it.bits}-bit {groups[it.path]}" for it in figures}
    seen = list(short.values())
    return {
        it.path: it.name.rpartition("/")[2] if seen.count(short[it.path]) > 1 else short[it.path]
        for it in figures
    }


def _group(it: Measured) -> str:
    return "none" if it.group_size < 0 else str(it.group_size)


def _groups(it: Measured) -> str:
    return "no groups" if it.group_size < 0 else f"groups of {it.group_size}"


def _shape(bits: int) -> str:
    return SHAPES.get(bits, OTHER_SHAPE)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
