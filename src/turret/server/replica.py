"""What a server shares with the other servers of its store: quotas, sessions, and which of them applies the guards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from turret.database import Database
from turret.errors import LeaseLost, StoreError, TurretError
from turret.server.auth import Sessions
from turret.server.limits import Quota, RequestLimits, SharedQuotas
from turret.server.logs import Log
from turret.store import leases
from turret.store.access_tokens import SessionRows
from turret.store.leases import Lease
from turret.store.usage import Budgets
from turret.turns import ThreadPool

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

    async def reserve(self, key: str, owner: str, quota: Quota) -> None:
        """Take the request that `SharedQuotas.admit` did not find from the catalog. Raises QuotaSpent."""
        await self._reserving.of(key)(self.quotas.reserve, key, owner, quota)

    async def look_up_session(self, session: str, client: str) -> None:
        """Look for a session that another server opened; it stays unknown if the catalog does not answer."""
        if self._sessions.is_strange(session):
            with suppress(TurretError):
                await self.signing.of(client)(self._sessions.look_up, session)

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

    def close(self) -> None:
        """Give back what this server holds, and stop the threads."""
        self.quotas.close()
        self._guards.close()
        self.signing.close()
        self._reserving.close()

    def _log_quotas(self, error: StoreError) -> None:
        self._log.write("quotas", "error", alone=True, error=type(error).__name__, message=str(error))
