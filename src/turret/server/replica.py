"""What a server shares with the other servers of its store: quotas, sessions, and which of them applies the guards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from turret.database import Database
from turret.errors import LeaseLost, QuotaSpent, StoreError, TurretError
from turret.server.limits import RequestLimits
from turret.server.logs import Log
from turret.server.quotas import Quota, Quotas
from turret.server.sessions import Sessions
from turret.server.thread_pool import ThreadPool
from turret.store import leases
from turret.store.access_tokens import SessionRows
from turret.store.leases import Lease
from turret.store.usage import Amount, Budgets

# --- shared quotas ----------------------------------------------------------------------------------------------------
# Quotas that all servers of a store share.
#
# A server counts alone first, as `turret.server.quotas` does, so a flood of requests that are refused asks the catalog
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


# --- leader -----------------------------------------------------------------------------------------------------------
# Which server of a store does the work that one of them must do: it holds a lease.


class Leader:
    """Holds the lease of some work while this server lives, if no other server holds it.

    Args:
        name: of the lease.
    """

    def __init__(self, database: Database, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._database, self._name, self._clock = database, name, clock
        self._lease: Lease | None = None
        self._renew_at = 0.0
        self._lock = threading.Lock()

    @property
    def leads(self) -> bool:
        return self._lease is not None

    def lead(self) -> bool:
        """Whether this server does the work now; takes or renews the lease if needed. Raises StoreError."""
        with self._lock:
            if self._lease is None:
                self._take()
            elif self._clock() >= self._renew_at:
                self._renew(self._lease)
            return self._lease is not None

    def close(self) -> None:
        """Give the lease back, so that another server goes on at once."""
        with self._lock, suppress(StoreError):
            if self._lease is not None:
                with self._database.writing() as connection:
                    leases.release(connection, self._lease)
                self._lease = None

    def _take(self) -> None:
        with self._database.reading() as connection:  # most servers wait for another one, and readers block nobody
            if leases.is_taken(connection, self._name):
                return
        with self._database.writing() as connection:
            self._lease = leases.take(connection, self._name)
        self._set_renewal()

    def _renew(self, lease: Lease) -> None:
        try:
            with self._database.writing() as connection:
                leases.renew(connection, lease)
        except LeaseLost:
            self._lease = None
        self._set_renewal()

    def _set_renewal(self) -> None:
        self._renew_at = self._clock() + (self._lease.seconds / 3 if self._lease is not None else 0.0)


# --- replica ----------------------------------------------------------------------------------------------------------


QUOTA_SECONDS = 0.5  # between two writes of charges to the catalog
SESSION_SECONDS = 1.0  # between two looks for sessions that ended on another server
MOST_SESSIONS = 64  # that are looked up in the catalog, or wait for it

Follower = tuple[str, Callable[[], None], float]  # name, what it does, seconds between two times


class Replica:
    """One server of several on one store.

    Args:
        database: Opened for the operator.
        sessions: Of this server.
    """

    def __init__(
        self, database: Database, sessions: Sessions, limits: RequestLimits, clock: Callable[[], float], log: Log
    ) -> None:
        self.quotas = SharedQuotas(clock, Budgets(database), self._log_quotas)
        self._sessions, self._log = sessions, log
        sessions.share(SessionRows(database))
        self._database, self._guards = database, Leader(database, "guards of experiments", clock)
        # Any client may send a cookie, so they wait apart from the control plane.
        self.signing = ThreadPool("session", 1, MOST_SESSIONS, "sessions are being looked up", 1)
        self._reserving = ThreadPool("quota", 2, 2 * limits.in_flight, "requests wait for their quotas", 1)

    async def admit(self, key: str, owner: str, quota: Quota) -> None:
        """Take one request from a quota that all servers share. Raises QuotaSpent."""
        if not self.quotas.admit(key, owner, quota):
            await self._reserving.of(key)(self.quotas.reserve, key, owner, quota)

    async def share_session(self, begun: str | None, ended: str | None) -> None:
        """Make a session known to all servers, and end another one there; only here if the catalog does not answer."""
        signing = self.signing.of(self._sessions.token_hash(begun or ended) or "")
        try:
            if begun is not None:
                await signing(self._sessions.keep, begun)
            if ended is not None:
                await signing(self._sessions.forget, ended)
        except TurretError as error:
            self._log.write("sessions", "error", alone=True, error=type(error).__name__, message=str(error))

    @property
    def leads(self) -> bool:
        """Whether this server applied the guards of experiments at the last look."""
        return self._guards.leads

    def lead(self) -> bool:
        """Whether this server applies the guards of experiments now. Raises StoreError."""
        return self._database.writable() and self._guards.lead()

    def followers(self) -> list[Follower]:
        """What threads of the server do again and again."""
        return [
            ("turret-quotas", self.quotas.turn, QUOTA_SECONDS),
            ("turret-sessions", self._sessions.refresh, SESSION_SECONDS),
        ]

    def close(self) -> None:
        """Give back what this server holds, and stop the threads."""
        self.quotas.close()
        self._guards.close()
        self.signing.close()
        self._reserving.close()

    def _log_quotas(self, error: StoreError) -> None:
        self._log.write("quotas", "error", alone=True, error=type(error).__name__, message=str(error))
