"""What a server shares with the other servers of its store: quotas, sessions, and which of them applies the guards."""

from __future__ import annotations

from collections.abc import Callable

from turret.database import Database
from turret.errors import StoreError, TurretError
from turret.server.leader import Leader
from turret.server.limits import RequestLimits
from turret.server.logs import Log
from turret.server.quotas import Quota
from turret.server.sessions import Sessions
from turret.server.shared_quotas import SharedQuotas
from turret.server.thread_pool import ThreadPool
from turret.store.budgets import Budgets
from turret.store.session_rows import SessionRows

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
