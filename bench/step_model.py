"""Work out how long a decoding step takes on a GPU, from the bytes it reads and what it launches.

    python bench/step_model.py [--table FILE]

seconds = (bytes of weights + sequences x context x bytes of a position) / bandwidth
          + launches x seconds that a launch costs.

No card was measured for this: bandwidths are the makers', of which SHARE is taken, and a launch in
a captured graph is taken to cost LAUNCH. `make gpu` puts in what it measures of its own card, and
prints what whole models took over what this says. `--table` rewrites the table of
docs/kernels/gpu.md.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

from shapes import SHAPES, Shape

__all__ = ["CARDS", "LLAMA_2_7B", "Card", "Decoder", "table"]

SHARE = 0.85  # of a card's bandwidth that the kernels are to reach
LAUNCH = 1.5e-6  # seconds; make gpu measures the card's own
# Four products, two norms, rotary with cache, attention, SiLU; and the sums of what is shared among
# programs: the products o and down, and attention.
LAUNCHES_A_LAYER = 12
LAUNCHES_BESIDE = 10  # embedding, rotary table, last norm, head, sampling
SEQUENCES = (1, 16)
MARKS = re.compile(r"(?<=<!-- model: begin -->\n).*?(?=<!-- model: end -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, by its maker's figures.

    Attributes:
        name: what people call it.
        bandwidth: of its memory, bytes a second.
        memory: bytes.
    """

    name: str
    bandwidth: float
    memory: float


CARDS = (
    Card("T4", 320e9, 16e9),
    Card("RTX 3090", 936e9, 24e9),
    Card("RTX 4090", 1008e9, 24e9),
    Card("A100 80 GB", 2039e9, 80e9),
    Card("H100 SXM", 3350e9, 80e9),
    Card("H200", 4800e9, 141e9),
)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A Llama-like model, by its sizes.

    Attributes:
        shape: its sizes.
        bits: of a code.
        group_size: rows that share a scale and a zero, 32 bits together.
        kv_bytes: of a key's or value's element.
    """

    shape: Shape
    bits: int = 4
    group_size: int = 128
    kv_bytes: float = 2

    @property
    def weight_bytes(self) -> float:
        """The weights that a step reads: packed layers, and a head in 16 bits."""
        keys = self.shape.hidden // self.shape.heads * self.shape.kv_heads
        block = self.shape.hidden * (2 * self.shape.hidden + 2 * keys + 3 * self.shape.inner)
        return block * self.shape.layers * (self.bits + 32 / self.group_size) / 8 + (
            2 * self.shape.vocabulary * self.shape.hidden
        )

    @property
    def position_bytes(self) -> float:
        """The keys and values of one position."""
        return (
            2
            * self.shape.layers
            * self.shape.hidden
            // self.shape.heads
            * self.shape.kv_heads
            * self.kv_bytes
        )

    @property
    def launches(self) -> int:
        """The kernels of a step."""
        return self.shape.layers * LAUNCHES_A_LAYER + LAUNCHES_BESIDE

    def step_seconds(
        self,
        bandwidth: float,
        *,
        sequences: int = 1,
        context: int = 0,
        launch: float = LAUNCH,
        launches: int | None = None,
    ) -> float:
        """Work out the seconds of a step of some sequences, each so many positions long.

        Args:
            bandwidth: bytes a second that are reached.
            sequences: how many take the step together.
            context: positions that each attends to.
            launch: the seconds of one launch.
            launches: how many, where they were counted.
        """
        moved = self.weight_bytes + sequences * context * self.position_bytes
        return moved / bandwidth + launch * (self.launches if launches is None else launches)


LLAMA_2_7B = Decoder(SHAPES["Llama-2-7B"])


def table(model: Decoder = LLAMA_2_7B, contexts: tuple[int, ...] = (64, 576)) -> str:
    """Write the table: tokens a second of one sequence, and of sixteen together."""
    head = ["card", "GB/s", "weights ms", "launches ms"]
    for context in contexts:
        head += [f"{count} at {context}" for count in SEQUENCES] + ["times"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for card in CARDS:
        reached = SHARE * card.bandwidth
        row = [
            card.name,
            f"{card.bandwidth / 1e9:.0f}",
            f"{1e3 * model.weight_bytes / reached:.2f}",
        ]
        row.append(f"{1e3 * LAUNCH * model.launches:.2f}")
        for context in contexts:
            rates = [
                count / model.step_seconds(reached, sequences=count, context=context)
                for count in SEQUENCES
            ]
            row += [f"{rate:,.0f}" for rate in rates] + [f"{rates[-1] / rates[0]:.1f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def limits(model: Decoder = LLAMA_2_7B) -> str:
    """Write for each card what launches take, and up to where sixteen are ten times one."""
    lines = []
    for card in CARDS:
        reached = SHARE * card.bandwidth
        share = LAUNCH * model.launches / model.step_seconds(reached, context=64)
        eight, quarter = replace(model, kv_bytes=1), replace(model, kv_bytes=0.5)
        lines.append(
            f"{card.name}: launches {share:.0%} of a step; ten times one up to "
            f"{_longest(model, reached)} positions, {_longest(quarter, reached):,} with a quarter "
            f"of the keys; {_times(eight, reached, 576):.1f} times one at 576 in 8 bits"
        )
    return "\n".join(lines) + "\n"


def _times(model: Decoder, bandwidth: float, context: int) -> float:
    one, many = (
        count / model.step_seconds(bandwidth, sequences=count, context=context)
        for count in SEQUENCES
    )
    return many / one


def _longest(model: Decoder, bandwidth: float) -> int:
    return max(it for it in range(0, 4096, 5) if _times(model, bandwidth, it) >= 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, help="rewrite the table of this page")
    arguments = parser.parse_args()
    if arguments.table:
        text = arguments.table.read_text(encoding="utf-8")
        arguments.table.write_text(MARKS.sub(lambda _: table(), text), encoding="utf-8")
    print(table(), limits(), sep="\n", end="")


if __name__ == "__main__":
    main()
