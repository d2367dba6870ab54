"""Quotas that all servers of a store share.

A server counts alone first, as `turret.server.quotas` does, so a flood of requests that are refused asks the catalog
nothing. Then it takes the request from the catalog (`turret.store.budgets`), in small batches. Tokens of answers are
charged to the catalog twice a second, and once: a flush that is tried again has the same number. While the catalog does
not answer, each server counts alone, and the log says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from turret.errors import QuotaSpent, StoreError
from turret.server.quotas import Quota, Quotas
from turret.store.budgets import Amount, Budgets

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
