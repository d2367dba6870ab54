"""Which server of a store does the work that one of them must do: it holds a lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from turret.database import Database
from turret.errors import LeaseLost, StoreError
from turret.store import leases
from turret.store.leases import Lease


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
