"""Count what a server does, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Metrics"]

# From a token of a small model to a long reply of a large one.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and histograms, kept on the server's one event loop."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter[Labels]] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums: Counter[str] = Counter()

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._counters.setdefault(name, Counter())[tuple(sorted(labels.items()))] += by  # type: ignore[assignment]

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to a histogram."""
        buckets = self._buckets.setdefault(name, [0] * (len(SECONDS) + 1))
        buckets[bisect_left(SECONDS, seconds)] += 1
        self._sums[name] += seconds  # type: ignore[assignment]

    def total(self, name: str) -> float:
        """Give a counter's sum over all labels."""
        return sum(self._counters.get(name, Counter()).values())

    def render(self, gauges: Mapping[str, float], info: Mapping[str, str]) -> str:
        """Write everything, with values of this moment and what the model is."""
        return "\n".join([*self._lines(), *_gauges(gauges, info), ""])

    def _lines(self) -> Iterator[str]:
        for name, values in sorted(self._counters.items()):
            yield f"# TYPE {name} counter"
            for labels, value in sorted(values.items()):
                yield f"{name}{_labels(labels)} {value:g}"
        for name, buckets in sorted(self._buckets.items()):
            yield f"# TYPE {name} histogram"
            total = 0
            for edge, count in zip((*map(str, SECONDS), "+Inf"), buckets, strict=True):
                total += count
                yield f'{name}_bucket{{le="{edge}"}} {total}'
            yield f"{name}_sum {self._sums[name]:.6f}"
            yield f"{name}_count {total}"


def _gauges(gauges: Mapping[str, float], info: Mapping[str, str]) -> Iterator[str]:
    for name, value in gauges.items():
        yield f"# TYPE {name} gauge"
        yield f"{name} {value:.15g}"
    if info:
        yield "# TYPE gptq_model_info gauge"
        yield f"gptq_model_info{_labels(tuple(info.items()))} 1"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
