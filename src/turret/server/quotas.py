"""Quotas of requests and tokens per minute, as token buckets that refill evenly.

A request takes one from the bucket of requests, and needs a positive balance in the bucket of tokens. The tokens of an
answer are known only when it is ready. They are charged then, below zero if necessary; the next request waits until the
balance is positive again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from turret.errors import QuotaSpent

MAX_KEYS = 4096  # above this, keys with full buckets are dropped


@dataclass(frozen=True)
class Quota:
    """Limits per minute; None for no limit."""

    requests: int | None = None
    tokens: int | None = None


class _Bucket:
    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self.level = float(per_minute)
        self.at = now

    def fill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def wait(self, amount: float) -> float:
        """Seconds until the bucket holds the amount."""
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)


class Quotas:
    """The buckets of every key in use."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[str, dict[str, _Bucket]] = {}

    def admit(self, key: str, owner: str, quota: Quota) -> None:
        """Take one request, or raise QuotaSpent and take nothing. owner: the key's name in the error."""
        buckets = self._filled(key, quota)
        for unit in ("requests", "tokens"):
            bucket = buckets.get(unit)
            if bucket is not None and (seconds := bucket.wait(1)) > 1e-9:
                raise QuotaSpent(
                    f"the quota of {owner} is spent: {bucket.per_minute} {unit} a minute; try again in {seconds:.0f} s",
                    retry_after=seconds,
                )
        if "requests" in buckets:
            buckets["requests"].level -= 1

    def charge(self, key: str, quota: Quota, tokens: int) -> None:
        """Take the tokens of an answer."""
        buckets = self._filled(key, quota)
        if "tokens" in buckets:
            buckets["tokens"].level -= tokens

    def give_back(self, key: str) -> None:
        """Return one request that was admitted and then refused."""
        if (bucket := self._buckets.get(key, {}).get("requests")) is not None:
            bucket.level = min(bucket.per_minute, bucket.level + 1)

    def set_tokens(self, key: str, quota: Quota, level: float) -> None:
        """Take over the level of tokens that all servers share."""
        if (bucket := self._filled(key, quota).get("tokens")) is not None:
            bucket.level = min(bucket.per_minute, level)

    def __len__(self) -> int:
        return len(self._buckets)

    def _filled(self, key: str, quota: Quota) -> dict[str, _Bucket]:
        now = self._clock()
        limits = {"requests": quota.requests, "tokens": quota.tokens}
        sizes = {unit: size for unit, size in limits.items() if size is not None}
        buckets = self._buckets.get(key, {})
        if {unit: bucket.per_minute for unit, bucket in buckets.items()} != sizes:
            buckets = {unit: _Bucket(size, now) for unit, size in sizes.items()}
        for bucket in buckets.values():
            bucket.fill(now)
        if buckets:
            self._buckets[key] = buckets
        if len(self._buckets) > MAX_KEYS:
            self._drop_full(now)
        return buckets

    def _drop_full(self, now: float) -> None:
        """Drop the keys whose buckets are full: a new key starts with full buckets too."""
        for key, buckets in list(self._buckets.items()):
            for bucket in buckets.values():
                bucket.fill(now)
            if all(bucket.level >= bucket.per_minute for bucket in buckets.values()):
                del self._buckets[key]
