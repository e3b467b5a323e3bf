"""Count what a server does, in Prometheus' text format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric

__all__ = ["Metrics"]

# From a token of a small model to a long reply of a large one.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters and histograms of one server, in a registry that no other server shares."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "gptq_requests_total",
            "HTTP requests, by route and status",
            ["route", "status"],
            registry=self._registry,
        )
        self.prompt_tokens = self._counter("gptq_prompt_tokens_total", "Tokens of prompts")
        self.generated_tokens = self._counter("gptq_generated_tokens_total", "Tokens of replies")
        self.replies = self._counter("gptq_replies_total", "Replies that were generated")
        self.request_seconds = self._histogram("gptq_request_seconds", "Duration of a request")
        self.queue_seconds = self._histogram("gptq_queue_seconds", "Time until a model is ready")
        self.first_token_seconds = self._histogram(
            "gptq_first_token_seconds", "Time to the first token"
        )

    def total(self, name: str) -> float:
        """Return the value of a counter without labels."""
        return self._registry.get_sample_value(name) or 0

    def render(self, more: Iterable[Metric] = ()) -> bytes:
        """Return all metrics, and `more` that were read just now, in the text format."""
        return generate_latest(_Collected([*self._registry.collect(), *more]))

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, registry=self._registry)

    def _histogram(self, name: str, documentation: str) -> Histogram:
        return Histogram(name, documentation, buckets=SECONDS, registry=self._registry)


class _Collected:
    """Metrics to write, without the times at which each was created: those are OpenMetrics'."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> list[Metric]:
        for metric in self._metrics:
            metric.samples = [it for it in metric.samples if not it.name.endswith("_created")]
        return self._metrics
