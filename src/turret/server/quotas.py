"""Quotas of requests and tokens per minute, as token buckets that refill evenly; shared by the servers of a store.

A request takes one from the bucket of requests, and needs a positive balance in the bucket of tokens. The tokens of an
answer are known only when it is ready. They are charged then, below zero if necessary; the next request waits until the
balance is positive again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from turret.errors import QuotaSpent, StoreError
from turret.store.usage import Amount, Budgets

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


# --- shared quotas ----------------------------------------------------------------------------------------------------
# Quotas that all servers of a store share.
#
# A server counts alone first, so a flood of requests that are refused asks the catalog
# nothing. Then it takes the request from the catalog (`turret.store.usage`), in small batches. Tokens of answers are
# charged to the catalog twice a second, and once: a flush that is tried again has the same number. While the catalog
# does not answer, each server counts alone, and the log says so.


IDLE_SECONDS = 1.0  # after which an unused reservation is given back
LAST_TRIES = 3  # of the flush when a server ends
ALONE_SECONDS = 5.0  # after an error of the catalog, until it is asked again


@dataclass
class _Reserved:
    """Requests that this server may admit without asking the catalog."""

    per_minute: int
    count: int
    used: float  # when the last one was added or taken


class SharedQuotas:
    """The quotas of one server, which it shares with the others.

    `admit` and `charge` never block; `reserve` and `turn` ask the catalog, so they belong on other threads.

    Args:
        log: called with an error of the catalog.
    """

    def __init__(self, clock: Callable[[], float], budgets: Budgets, log: Callable[[StoreError], None]) -> None:
        self._clock, self._budgets, self._log = clock, budgets, log
        self._own, self._lock = Quotas(clock), threading.Lock()
        self._reserved: dict[str, _Reserved] = {}
        self._charges: dict[str, tuple[int, int]] = {}  # key -> limit per minute, tokens
        self._unsure, self._turning = list[Amount](), threading.Lock()  # of the flush that is tried
        self._levels: dict[str, float] = {}  # of tokens in the catalog, to be taken over by `admit`
        self._alone_until = float("-inf")

    def admit(self, key: str, owner: str, quota: Quota) -> bool:
        """Take one request. False: the catalog must be asked too, by `reserve`. Raises QuotaSpent."""
        with self._lock:
            level = self._levels.pop(key, None)
        if level is not None:
            self._own.set_tokens(key, quota, level)
        self._own.admit(key, owner, quota)
        if quota.requests is None or self._clock() < self._alone_until:
            return True
        with self._lock:
            found = self._reserved.get(key)
            if found is None or not found.count or found.per_minute != quota.requests:
                return False
            found.count, found.used = found.count - 1, self._clock()
            return True

    def reserve(self, key: str, owner: str, quota: Quota) -> None:
        """Take the request that `admit` did not find from the catalog. Raises QuotaSpent."""
        assert quota.requests is not None
        try:
            count, seconds = self._budgets.take(key, "requests", quota.requests)
        except StoreError as error:
            self._alone_until = self._clock() + ALONE_SECONDS
            self._log(error)
            return
        if not count:
            self._own.give_back(key)
            raise QuotaSpent(
                f"the quota of {owner} is spent: {quota.requests} requests a minute; try again in {seconds:.0f} s",
                retry_after=seconds,
            )
        with self._lock:
            found = self._reserved.setdefault(key, _Reserved(quota.requests, 0, 0.0))
            found.per_minute, found.count, found.used = quota.requests, found.count + count - 1, self._clock()

    def charge(self, key: str, quota: Quota, tokens: int) -> None:
        """Take the tokens of an answer."""
        self._own.charge(key, quota, tokens)
        if quota.tokens is not None:
            with self._lock:
                self._charges[key] = quota.tokens, self._charges.get(key, (0, 0))[1] + tokens

    def turn(self, *, last: bool = False) -> None:
        """Charge tokens to the catalog, and give back what was reserved and is not used.

        Raises StoreError; the next turn then tries the same amounts again first.
        """
        with self._turning:
            if self._unsure:
                self._write(self._budgets.writer.number)
            now = self._clock()
            with self._lock:
                charges, self._charges = self._charges, {}
                idle = {key: each for key, each in self._reserved.items() if last or now - each.used > IDLE_SECONDS}
                for key in idle:
                    del self._reserved[key]
            self._unsure = [(key, "tokens", limit, -float(tokens)) for key, (limit, tokens) in charges.items()]
            given_back = ((key, each) for key, each in idle.items() if each.count)
            self._unsure += [(key, "requests", each.per_minute, float(each.count)) for key, each in given_back]
            if self._unsure:
                self._write(self._budgets.writer.next())

    def _write(self, number: int) -> None:
        levels = self._budgets.change(self._unsure, number)
        self._unsure = []
        with self._lock:
            self._levels |= {key: level for (key, unit), level in levels.items() if unit == "tokens"}

    def close(self) -> None:
        """Write the last charges, and give everything back."""
        for _ in range(LAST_TRIES):
            with suppress(StoreError):
                self.turn(last=True)
                break
