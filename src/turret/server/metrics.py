"""What Prometheus reads: counters, histograms, and the engine's own figures. Labels are few, whatever is asked for.

A label is a route of ours, a status, or a version that answered; never words of a request. Beyond `MOST_VERSIONS`
versions the rest are counted together as `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MOST_VERSIONS = 200
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _label(self, version: str) -> str:
        if version not in self._versions and len(self._versions) >= MOST_VERSIONS:
            return "other"
        self._versions.add(version)
        return version

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(name, said, labels, registry=self._registry)

    def _histogram(self, name: str, said: str, *labels: str) -> Histogram:
        return Histogram(name, said, labels, buckets=SECONDS, registry=self._registry)


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
