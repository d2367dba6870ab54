"""How many requests and tokens a minute someone may ask for: buckets that fill up again. No torch, no HTTP, no clock.

A request takes one from the bucket of requests, and must find something in that of tokens. How many tokens an answer
costs is known when it is there: they are taken then, below zero where need be, and the next request waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from turret.errors import QuotaSpent

MOST_KEPT = 4096


@dataclass(frozen=True)
class Quota:
    """None: no bound."""

    requests: int | None = None  # a minute
    tokens: int | None = None  # a minute


class _Bucket:
    """`per_minute` at most, filled evenly."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self.level = float(per_minute)
        self.at = now

    def fill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def wait(self, wanted: float) -> float:
        """Seconds until that much is there."""
        return max(0.0, (min(wanted, self.per_minute) - self.level) * 60 / self.per_minute)


class Quotas:
    """A pair of buckets for each key that is in use; a pair that is full again is forgotten."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[str, dict[str, _Bucket]] = {}

    def admit(self, key: str, whose: str, quota: Quota) -> None:
        """Take one request, or raise QuotaSpent and take nothing. whose: words for the error."""
        buckets = self._of(key, quota)
        for unit in ("requests", "tokens"):
            bucket = buckets.get(unit)
            if bucket is not None and (seconds := bucket.wait(1)) > 1e-9:
                raise QuotaSpent(
                    f"the quota of {whose} is spent: {bucket.per_minute} {unit} a minute; try again in {seconds:.0f} s",
                    retry_after=seconds,
                )
        if "requests" in buckets:
            buckets["requests"].level -= 1

    def charge(self, key: str, quota: Quota, tokens: int) -> None:
        """Take what an answer cost."""
        buckets = self._of(key, quota)
        if "tokens" in buckets:
            buckets["tokens"].level -= tokens

    def __len__(self) -> int:
        return len(self._buckets)

    def _of(self, key: str, quota: Quota) -> dict[str, _Bucket]:
        now = self._clock()
        wanted = {"requests": quota.requests, "tokens": quota.tokens}
        sizes = {unit: size for unit, size in wanted.items() if size is not None}
        buckets = self._buckets.get(key, {})
        if {unit: bucket.per_minute for unit, bucket in buckets.items()} != sizes:
            buckets = {unit: _Bucket(size, now) for unit, size in sizes.items()}
        for bucket in buckets.values():
            bucket.fill(now)
        if buckets:
            self._buckets[key] = buckets
        if len(self._buckets) > MOST_KEPT:
            self._forget(now)
        return buckets

    def _forget(self, now: float) -> None:
        """What is full again is as if it had never been."""
        for key, buckets in list(self._buckets.items()):
            for bucket in buckets.values():
                bucket.fill(now)
            if all(bucket.level >= bucket.per_minute for bucket in buckets.values()):
                del self._buckets[key]
