"""What Prometheus reads: counters, histograms, and the engine's own figures. Labels are few, whatever is asked for.

A label is a route of ours, a status, an experiment's arm, or a version that answered; never words of a request. Beyond
`MOST_VERSIONS` versions and experiments the rest are counted together as `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MOST_VERSIONS = 200
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Traffic:
    """What one version has answered since the server began."""

    version: str
    requests: int
    answers: int
    failures: int
    tokens: int
    mean_seconds: float | None
    most_seconds: float | None  # 95% of its requests took at most this: the bound of a bucket


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, gauges: Callable[[], Mapping[str, float]]) -> None:
        self._registry = CollectorRegistry()
        self._versions: set[str] = set()
        self._requests = self._counter("turret_requests", "Requests answered", "route", "status")
        self._seconds = self._histogram("turret_request_seconds", "Seconds until the last byte", "route")
        self._answers = self._counter("turret_adapter_answers", "Answers of a version", "adapter", "kind")
        self._failures = self._counter("turret_adapter_failures", "Answers of a version that failed", "adapter", "kind")
        self._tokens = self._counter("turret_adapter_tokens", "Tokens of a version's answers", "adapter")
        self._latency = self._histogram("turret_adapter_seconds", "Seconds of a version's answers", "adapter")
        arm = ("experiment", "arm")
        self._arms = self._counter("turret_experiment_answers", "Answers of an arm", *arm, "adapter")
        self._arm_failures = self._counter("turret_experiment_failures", "Errors of an arm's own", *arm, "adapter")
        self._arm_latency = self._histogram("turret_experiment_seconds", "Seconds of an arm's answers", *arm)
        self._outside = self._counter("turret_experiment_uncounted", "Requests without a unit", "experiment")
        self._shadows = self._counter("turret_experiment_shadows", "What shadows did", *arm, "what")
        self._outcomes = self._counter("turret_experiment_outcomes", "Outcomes that were told", "experiment", "status")
        self._registry.register(_Gauges(gauges))

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def answered(self, version: str, kind: str, count: int, failed: int, tokens: int, seconds: float) -> None:
        """One request to one version: how many answers, how many of them failed, and what they took."""
        label = self._label(version)
        self._answers.labels(label, kind).inc(count - failed)
        if failed:
            self._failures.labels(label, kind).inc(failed)
        self._tokens.labels(label).inc(tokens)
        self._latency.labels(label).observe(seconds)

    def arm(self, experiment: str, arm: str, version: str, seconds: float, *, failed: bool) -> None:
        """One answer of an arm, or one error that is its own."""
        labels = self._label(experiment), arm, self._label(version)
        (self._arm_failures if failed else self._arms).labels(*labels).inc()
        self._arm_latency.labels(*labels[:2]).observe(seconds)

    def outside(self, experiment: str) -> None:
        """A request that an experiment covers and does not count."""
        self._outside.labels(self._label(experiment)).inc()

    def shadow(self, experiment: str, arm: str, what: str) -> None:
        """What a shadow did: agreed, differed, answered (and was not compared), failed, shed."""
        self._shadows.labels(self._label(experiment), arm, what).inc()

    def told(self, experiment: str | None, status: str) -> None:
        """An outcome, and what became of it."""
        self._outcomes.labels(self._label(experiment) if experiment else "none", status).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _label(self, version: str) -> str:
        """Of a version or an experiment."""
        if version not in self._versions and len(self._versions) >= MOST_VERSIONS:
            return "other"
        self._versions.add(version)
        return version

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(name, said, labels, registry=self._registry)

    def _histogram(self, name: str, said: str, *labels: str) -> Histogram:
        return Histogram(name, said, labels, buckets=SECONDS, registry=self._registry)

    def traffic(self) -> Sequence[Traffic]:
        """What was answered since the server began, a version a row, the busiest first."""
        rows = [_of_version(version, self._sums(version)) for version in sorted(self._versions)]
        return sorted((each for each in rows if each.requests), key=lambda each: -each.requests)

    def _sums(self, version: str) -> dict[str, Any]:
        found: dict[str, Any] = {"buckets": {}}
        for metric in (self._answers, self._failures, self._tokens, self._latency):
            for sample in next(iter(metric.collect())).samples:
                if sample.labels.get("adapter") != version or sample.name.endswith("_created"):
                    continue
                if (most := sample.labels.get("le")) is not None:
                    found["buckets"][float(most)] = sample.value
                else:
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found


def _of_version(version: str, sums: Mapping[str, Any]) -> Traffic:
    requests = int(sums.get("turret_adapter_seconds_count", 0))
    return Traffic(
        version,
        requests,
        int(sums.get("turret_adapter_answers_total", 0)),
        int(sums.get("turret_adapter_failures_total", 0)),
        int(sums.get("turret_adapter_tokens_total", 0)),
        sums.get("turret_adapter_seconds_sum", 0.0) / requests if requests else None,
        _within(sums["buckets"], 0.95 * requests) if requests else None,
    )


def _within(buckets: Mapping[float, float], wanted: float) -> float:
    """The bound of the first bucket that holds so many: an upper bound of that quantile."""
    return next(most for most, held in sorted(buckets.items()) if held >= wanted)


class _Gauges(Collector):
    """Figures that are read when somebody asks."""

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, value in self._read().items():
            yield GaugeMetricFamily(f"turret_{name}", name.replace("_", " "), value=value)

    def describe(self) -> list[Metric]:
        return []


def numbers(prefix: str, said: Mapping[str, Any]) -> dict[str, float]:
    """The figures among these values, named `prefix_key`."""
    return {
        f"{prefix}_{key}": float(value)
        for key, value in said.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
