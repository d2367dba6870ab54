"""Metrics for Prometheus: counters, histograms and the engines' own figures.

A label is a route, a status, an arm, a tenant, or a version or experiment that answered; never a text of a request.
Beyond `MOST_VERSIONS` versions and experiments, or tenants, the rest are counted together as `other`.

Every tenant has metrics of its own. Those of the tenant `default` have the figures of the server too, and the totals of
each tenant (`TenantTotals`); only an operator gets these. The figures of an engine have the label `base` if there are
several engines.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from turret.access import DEFAULT
from turret.json_types import Plain, mapping_of
from turret.workspace.promising import PromiseStatus

STATES = ("holds so far", "broken", "cannot be known")  # of a promise
MOST_VERSIONS = 200
NO_ADAPTER = ("base", "other", "none")  # labels of answers of the bare base, of many adapters, of no experiment
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PERCENTILES = (0.5, 0.95, 0.99)
FIRST_BOUND, BOUND_RATIO = 0.001, 1.2  # of `LastDay`: seconds
# Figures of the engine that only grow; its others are current values.
COUNTED = {
    f"engine_{name}"
    for name in ("passes", "prompt_tokens", "tokens", "answers", "errors", "loads", "failed_loads", "evictions")
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


Figures: TypeAlias = Mapping[str, Plain]  # of an engine: numbers, and histograms


@dataclass(frozen=True)
class Traffic:
    """What one version has answered since the server started."""

    version: str
    requests: int
    answers: int
    failures: int
    tokens: int
    percentiles: Sequence[float] | None  # seconds, of the last day: see `LastDay`; None if nothing was asked in it


class LastDay:
    """How long the requests to each version took in the last 24 hours. Safe to use from several threads.

    Requests are counted by hour, and by bounds of which each is 1.2x the one before. So a percentile is at most 20% too
    high. The oldest hour leaves as a whole: the time that is covered is 23 to 24 hours.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._hours: dict[int, dict[str, Counts[int]]] = {}  # hour -> version -> place of the bound -> requests

    def add(self, version: str, seconds: float) -> None:
        """Count a request."""
        place = 0 if seconds <= FIRST_BOUND else math.ceil(math.log(seconds / FIRST_BOUND, BOUND_RATIO))
        with self._lock:
            hour = int(self._clock() // 3600)
            if hour not in self._hours:
                self._hours = {each: kept for each, kept in self._hours.items() if each > hour - 24} | {hour: {}}
            self._hours[hour].setdefault(version, Counts())[place] += 1

    def percentiles(self, version: str) -> Sequence[float] | None:
        """Seconds within which 50%, 95% and 99% of the requests to a version ended; None without requests."""
        total = Counts[int]()
        with self._lock:
            oldest = int(self._clock() // 3600) - 24
            for hour, versions in self._hours.items():
                if hour > oldest:
                    total.update(versions.get(version, {}))
        if not total:
            return None
        found, seen, places = [], 0, iter(sorted(total))
        for share in PERCENTILES:
            while seen < share * total.total():
                seen += total[place := next(places)]
            found.append(FIRST_BOUND * BOUND_RATIO**place)
        return found


def _every_name(name: str) -> bool:
    return True


class TenantTotals:
    """What the adapters and the base answered to each tenant, for who operates the server."""

    def __init__(self) -> None:
        self.registry, self._tenants = CollectorRegistry(), set[str]()
        self._requests = self._counter("turret_tenant_requests", "Requests of a tenant to a version or the base")
        self._answers = self._counter("turret_tenant_answers", "Answers to a tenant")
        self._failures = self._counter("turret_tenant_failures", "Answers to a tenant that did not complete")
        self._tokens = self._counter("turret_tenant_tokens", "Tokens of the answers to a tenant")

    def count_request(self, tenant: str, count: int, failed: int, tokens: int) -> None:
        """One request of a tenant, with so many answers and failed inputs."""
        label = tenant if tenant in self._tenants or len(self._tenants) < MOST_VERSIONS else "other"
        self._tenants.add(label)
        self._requests.labels(label).inc()
        self._answers.labels(label).inc(count)
        self._failures.labels(label).inc(failed)
        self._tokens.labels(label).inc(tokens)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(name, help, ("tenant",), registry=self.registry)


class Metrics:
    """The metrics of one tenant on one server.

    Args:
        tenant: Whose answers they count.
        totals: Counts the answers to all tenants.
        gauges: Current values; called whenever the metrics are read.
        engines: The figures of the engine of each base, likewise. A histogram has `buckets` and `sum`.
        replica: The name of this server, which becomes a label of every series; None for no such label.
        build: What is served on each base, and by which version; empty leaves it out, and the process too.
        adapters: What clients may call the adapters in memory, and those that requests wait for; for routers.
    """

    def __init__(
        self,
        gauges: Callable[[], Mapping[str, float]],
        engines: Callable[[], Mapping[str, Figures]] = dict,
        build: Sequence[Mapping[str, str]] = (),
        replica: str | None = None,
        tenant: str = DEFAULT,
        totals: TenantTotals | None = None,
        adapters: Callable[[], tuple[Sequence[str], Sequence[str]]] | None = None,
    ) -> None:
        self._tenant, self._totals = tenant, totals or TenantTotals()
        self._registry, self._replica = CollectorRegistry(), {} if replica is None else {"replica": replica}
        if build:
            ProcessCollector(registry=self._registry)
            labels = tuple(build[0])
            served = Gauge("turret_build_info", "What is served, and by which version", labels, registry=self._registry)
            for each in build:
                served.labels(**each).set(1)
        self._versions: set[str] = set()
        self._last_day = LastDay()
        self._requests = self._counter("turret_requests", "Requests", "route", "status")
        self._seconds = self._histogram("turret_request_seconds", "Seconds until the last byte", "route")
        self._answers = self._counter("turret_adapter_answers", "Answers of a version", "adapter", "kind")
        self._failures = self._counter("turret_adapter_failures", "Answers that did not complete", "adapter", "kind")
        self._tokens = self._counter("turret_adapter_tokens", "Tokens of a version's answers", "adapter")
        self._latency = self._histogram("turret_adapter_seconds", "Seconds of a version's requests", "adapter")
        arm = ("experiment", "arm")
        self._arms = self._counter("turret_experiment_answers", "Answers of an arm", *arm, "adapter")
        self._arm_failures = self._counter("turret_experiment_failures", "Errors caused by an arm", *arm, "adapter")
        self._arm_latency = self._histogram("turret_experiment_seconds", "Seconds of an arm's answers", *arm)
        self._uncounted = self._counter("turret_experiment_uncounted", "Requests without a unit", "experiment")
        self._shadows = self._counter("turret_experiment_shadows", "Results of shadows", *arm, "what")
        self._outcomes = self._counter("turret_experiment_outcomes", "Outcomes received", "experiment", "status")
        self._promised = self._counter("turret_promise_answers", "Answers that a promise covers", "adapter", "what")
        gauge = partial(Gauge, registry=self._registry)
        self._promise_states = gauge("turret_promise_state", "1 for the state of a promise", ("adapter", "state"))
        self._promise_breaks = gauge("turret_promise_breaks", "Promises of a version that broke", ("adapter",))
        self._input_drift = gauge(
            "turret_promise_inputs_drifted", "1 once the texts of a version drifted", ("adapter",)
        )
        self._input_texts = gauge("turret_promise_inputs_texts", "Texts that were compared", ("adapter",))
        self._registry.register(_Engines(gauges, engines))
        if adapters is not None:
            self._registry.register(_Routed(engines, adapters))

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_request(self, version: str, kind: str, count: int, failed: int, tokens: int, seconds: float) -> None:
        """One request to a version, with so many answers and failed inputs."""
        label = self._label(version)
        self._answers.labels(label, kind).inc(count)
        if failed:
            self._failures.labels(label, kind).inc(failed)
        self._tokens.labels(label).inc(tokens)
        self._latency.labels(label).observe(seconds)
        self._last_day.add(label, seconds)
        self._totals.count_request(self._tenant, count, failed, tokens)

    def arm(self, experiment: str, arm: str, version: str, seconds: float, *, failed: bool) -> None:
        """One answer of an arm, or one error that the arm caused."""
        labels = self._label(experiment), arm, self._label(version)
        (self._arm_failures if failed else self._arms).labels(*labels).inc()
        self._arm_latency.labels(*labels[:2]).observe(seconds)

    def count_uncounted(self, experiment: str) -> None:
        """A request that an experiment covers but does not count."""
        self._uncounted.labels(self._label(experiment)).inc()

    def shadow(self, experiment: str, arm: str, what: str) -> None:
        """What a shadow did: agreed, differed, answered (without a comparison), failed, shed."""
        self._shadows.labels(self._label(experiment), arm, what).inc()

    def outcome(self, experiment: str | None, status: str) -> None:
        """An outcome, and its result."""
        self._outcomes.labels(self._label(experiment) if experiment else "none", status).inc()

    def count_abstained(self, version: str, answers: int, abstained: int) -> None:
        """Answers of a version with a promise."""
        label = self._label(version)
        self._promised.labels(label, "decided").inc(answers - abstained)
        self._promised.labels(label, "abstained").inc(abstained)

    def promises(self, found: Sequence[PromiseStatus]) -> None:
        """How all promises stand; of the server that applies the guards."""
        self._promise_states.clear()
        self._promise_breaks.clear()
        self._input_drift.clear()
        self._input_texts.clear()
        for each in found:
            label = self._label(each.version)
            self._promise_breaks.labels(label).set(each.breaks)
            for state in STATES:
                self._promise_states.labels(label, state).set(float(each.standing.state == state))
            if each.inputs.state != "not watched":
                self._input_drift.labels(label).set(float(each.inputs.state == "drifted"))
                self._input_texts.labels(label).set(each.inputs.texts)

    def text(self, sees: Callable[[str], bool] = _every_name, *, operates: bool = True) -> bytes:
        """All metrics in Prometheus' format.

        Args:
            sees: Whether an adapter may be seen, by its name or version.
            operates: Whether the reader operates the server. Others get the series of adapters alone.
        """
        seen = CollectorRegistry(auto_describe=False)
        sees = cache(sees)  # it may read the store
        seen.register(_Seen(self._registry, sees, self._replica, operates=operates))
        if operates:
            seen.register(_Seen(self._totals.registry, sees, self._replica, operates=True))
        return generate_latest(seen)

    def traffic(self, sees: Callable[[str], bool] = _every_name) -> Sequence[Traffic]:
        """The traffic of each version that may be seen, the busiest first."""
        rows = [self._traffic(version) for version in sorted(self._versions) if sees(version)]
        return sorted((row for row in rows if row.requests), key=lambda row: -row.requests)

    def _traffic(self, version: str) -> Traffic:
        sums: dict[str, float] = defaultdict(float)
        for metric in (self._answers, self._failures, self._tokens, self._latency):
            for sample in next(iter(metric.collect())).samples:
                if sample.labels.get("adapter") == version and "le" not in sample.labels:
                    sums[sample.name] += sample.value
        return Traffic(
            version,
            int(sums["turret_adapter_seconds_count"]),
            int(sums["turret_adapter_answers_total"]),
            int(sums["turret_adapter_failures_total"]),
            int(sums["turret_adapter_tokens_total"]),
            self._last_day.percentiles(version),
        )

    def _label(self, name: str) -> str:
        """The label of a version or an experiment."""
        if name not in self._versions and len(self._versions) >= MOST_VERSIONS:
            return "other"
        self._versions.add(name)
        return name

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str, *labels: str) -> Histogram:
        return Histogram(name, help, labels, buckets=SECONDS, registry=self._registry)


class _Seen(Collector):
    """The metrics of a registry, without the samples that may not be seen.

    Args:
        more: Labels of every sample.
        operates: Whether samples of no adapter may be seen.
    """

    def __init__(
        self, registry: CollectorRegistry, sees: Callable[[str], bool], more: Mapping[str, str], *, operates: bool
    ) -> None:
        self._registry, self._sees, self._more, self._operates = registry, sees, more, operates

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            seen = [sample for sample in metric.samples if self._is_seen(sample.labels)]
            if not seen and not self._operates:
                continue
            metric.samples = [sample._replace(labels={**sample.labels, **self._more}) for sample in seen]
            yield metric

    def _is_seen(self, labels: Mapping[str, str]) -> bool:
        names = [labels[key] for key in ("adapter", "experiment") if key in labels]
        if not names:
            return self._operates
        return all(self._sees("" if name in NO_ADAPTER else name) for name in names)


class _Engines(Collector):
    """Values that are counted elsewhere. The engines' are labelled with their base if there are several."""

    def __init__(self, gauges: Callable[[], Mapping[str, float]], engines: Callable[[], Mapping[str, Figures]]) -> None:
        self._gauges, self._engines = gauges, engines

    def collect(self) -> Iterator[Metric]:
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(f"turret_{name}", name.replace("_", " "), value=value)
        figures = self._engines()
        labels = ("base",) if len(figures) > 1 else ()
        values = {base: numbers("engine", each) for base, each in figures.items()}
        for name in dict.fromkeys(name for each in values.values() for name in each):
            kind = CounterMetricFamily if name in COUNTED else GaugeMetricFamily
            family = kind(f"turret_{name}", name.replace("_", " "), labels=labels)
            for base, own in values.items():
                family.add_metric((base,)[: len(labels)], own[name])
            yield family
        for name in dict.fromkeys(name for each in figures.values() for name in _histograms(each)):
            shown = HistogramMetricFamily(f"turret_engine_{name}", f"engine {name.replace('_', ' ')}", labels=labels)
            for base, each in figures.items():
                histogram = mapping_of(each[name])
                shown.add_metric((base,)[: len(labels)], list(histogram["buckets"].items()), histogram["sum"])
            yield shown


class _Routed(Collector):
    """What routers choose a replica by, under vLLM's names and summed over all bases.

    The Gateway API Inference Extension (protocol 003) and llm-d read them. A name of an adapter that is in memory is
    one that a client may give as `model`.
    """

    def __init__(
        self,
        engines: Callable[[], Mapping[str, Figures]],
        adapters: Callable[[], tuple[Sequence[str], Sequence[str]]],
    ) -> None:
        self._engines, self._adapters = engines, adapters

    def collect(self) -> Iterator[Metric]:
        figures = list(self._engines().values())

        def total(key: str) -> float:
            return float(sum(value for each in figures if isinstance(value := each.get(key), int | float)))

        yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests that have not begun", total("waiting"))
        yield GaugeMetricFamily("vllm:num_requests_running", "Rows that generate", total("running"))
        used = min(1.0, total("cache_tokens") / max(1.0, total("most_cache_tokens")))
        for name in ("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc"):  # vLLM has renamed it
            yield GaugeMetricFamily(name, "Part of the KV cache in use, from 0 to 1", used)
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "Seconds since 1970 when this was read", labels=labels)
        loaded, waiting = (",".join(each) for each in self._adapters())
        family.add_metric((str(int(total("most_adapters"))), loaded, waiting), time.time())
        yield family


def _histograms(figures: Figures) -> list[str]:
    return [key for key, value in figures.items() if isinstance(value, dict) and "sum" in value]


def numbers(prefix: str, values: Figures) -> dict[str, float]:
    """The numbers among the values, named `prefix_key`."""
    return {
        f"{prefix}_{key}": float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
