"""How PostgreSQL is reached, written to by one at a time, and understood when it complains. Refuses to know tables.

- who writes holds one advisory lock of the database until the transaction ends, and sees all that was committed before
  it got it (READ COMMITTED); so there is one writer at a time, as with SQLite
- who reads sees one moment (REPEATABLE READ) and waits for nobody
- a transaction whose client was lost is ended by the server within `IDLE_SECONDS`, which is less than the next writer
  waits; this frees the lock, and nothing of it is kept. So no transaction that writes may wait for anything else, such
  as an object store
- a connection is used again by the next transactions of its process, for a minute, each time after a look whether the
  server still has it; a fork makes its own
- a server that is silent is given up after `ANSWER_SECONDS` by the client's own clock, and so is its connection: a time
  limit of the server does not help where the server is stopped, and TCP's do not where its kernel still answers
"""

from __future__ import annotations

import os
import time
import uuid
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from sqlalchemy import Connection, Engine, create_engine

from turret.errors import StoreError

LOCK = 0x747572726574  # "turret"; a database's schemas share it
BUSY_SECONDS = 60  # how long a writer waits for the writers before it
IDLE_SECONDS = 30  # after which the server ends the transaction of a writer that is heard no more
CONNECT_SECONDS = 10
ANSWER_SECONDS = 20.0  # of a statement, beyond what a writer waits for the writers before it
KEPT_SECONDS = 60  # from its making on, a connection is used again: none idles for so long that a firewall forgets it
KEPT = 2  # connections a process keeps for the next transaction; more at once are made and closed
_SECRETS = ("password", "sslpassword")
_DEFAULTS = {
    "connect_timeout": CONNECT_SECONDS,
    "application_name": "turret",
    "client_encoding": "utf-8",
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": int(1000 * ANSWER_SECONDS),
}


class Postgres:
    """One database of a server; reached at the first transaction, not before."""

    read_only = False
    name = "catalog"

    def __init__(self, url: str, shown: str, *, busy_seconds: int = BUSY_SECONDS) -> None:
        self.store = shown
        self._url = url
        self._busy_seconds = busy_seconds
        self._engines: dict[int, Engine] = {}  # of this process; a parent's stays, unused: closing it would end theirs

    @property
    def _engine(self) -> Engine:
        process = os.getpid()
        if process not in self._engines:
            _driver(self.store)
            engine = create_engine(
                "postgresql+psycopg://",
                creator=partial(_connect, self._url, self.store),
                pool_size=KEPT,
                max_overflow=-1,
                pool_pre_ping=True,
                pool_recycle=KEPT_SECONDS,
                use_native_hstore=False,
            )
            self._engines[process] = engine
            weakref.finalize(self, _close, engine, process)
        return self._engines[process]

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Connection]:
        """A transaction that sees one moment; one that writes is the only such until it ends."""
        level = "READ COMMITTED" if writes else "REPEATABLE READ"
        engine = self._engine.execution_options(isolation_level=level, postgresql_readonly=not writes)
        with engine.begin() as connection:
            if writes:
                self._wait_for_writers(connection)
            yield connection

    def _wait_for_writers(self, connection: Connection) -> None:
        limits = f"'lock_timeout', '{self._busy_seconds}s', true), set_config('idle_in_transaction_session_timeout'"
        connection.exec_driver_sql(f"SELECT set_config({limits}, '{IDLE_SECONDS}s', true)")
        driver: Any = connection.connection.dbapi_connection
        driver.waits = self._busy_seconds
        try:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        finally:
            driver.waits = 0
        # A change of a table waits for its readers, and must be told so by the server before this process gives up.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{int(ANSWER_SECONDS / 2)}s'")

    def identity(self, connection: Connection) -> str | None:
        """What tells this catalog from every other, on whatever server it is; None where that was lost.

        It is the comment on the table `alembic_version`, so that a dump carries it.
        """
        found = connection.exec_driver_sql("SELECT obj_description('alembic_version'::regclass, 'pg_class')").scalar()
        return None if found is None else str(found)

    def identify(self, connection: Connection) -> None:
        """Give it a new one, where it has none."""
        if self.identity(connection) is None:
            connection.exec_driver_sql(f"COMMENT ON TABLE alembic_version IS '{uuid.uuid4()}'")

    def writable(self, connection: Connection) -> bool:
        """Whether this user may write, on this server."""
        query = "SELECT has_table_privilege('versions', 'INSERT') AND NOT pg_is_in_recovery()"
        return bool(connection.exec_driver_sql(query).scalar())

    def damage(self, _connection: Connection) -> Iterator[str]:
        """Nothing: the server itself looks after its files and its references."""
        yield from ()

    def plainly(self, reason: str) -> str:
        """What it complains of, and what to do."""
        for key in _SECRETS:
            if secret := _wanted(self._url, self.store).get(key):
                reason = reason.replace(str(secret), "***")
        first = reason.strip().partition("\n")[0].removesuffix("?").strip()
        for words, said in _COMPLAINTS:
            if any(word in reason for word in words):
                return said.format(first=first, seconds=self._busy_seconds)
        return first


_COMPLAINTS = (
    (("lock timeout",), "another process has held it for {seconds} seconds: wait for it, or end it"),
    (
        ("the server is silent",),
        "{first}: look at the server and the network, and whether it was done; then try again",
    ),
    (
        ("password", "Peer authentication", "no pg_hba.conf entry"),
        "{first}: set PGPASSWORD or ~/.pgpass, or ask for access",
    ),
    (("does not exist",), "{first}: make it, or correct the URL"),
    (("permission denied", "must be owner"), "{first}: grant it, or connect as another user"),
    (("read-only transaction",), "it is read-only here: connect to the server that is written to"),
    (("No space left", "disk full"), "the server's disk is full ({first}): free some space there and try again"),
    (("too many clients", "remaining connection slots"), "{first}: try again, or raise max_connections"),
    (
        (
            "terminating connection",
            "server closed",
            "connection is lost",
            "connection has been closed",
            "idle-in-trans",
        ),
        "the connection was lost ({first}): look whether it was done, and try again",
    ),
    (
        ("connection failed", "connection to server", "could not translate", "failed to resolve", "timeout expired"),
        "cannot be reached ({first}): check host and port, and that it runs",
    ),
)


def _wanted(url: str, store: str) -> dict[str, Any]:
    """What the URL says, by libpq's keys; raises StoreError."""
    psycopg = _driver(store)
    try:
        return dict(psycopg.conninfo.conninfo_to_dict(url))
    except psycopg.ProgrammingError:  # it repeats the URL, and with it the password
        pass
    raise StoreError(
        f"store {store}: PostgreSQL cannot read this URL: expected keys that libpq knows beside files and "
        "local, a number as port, and % codes for what is special"
    )


def _connect(url: str, store: str) -> Any:
    return _answering(_driver(store)).connect(**{**_DEFAULTS, **_wanted(url, store)}, prepare_threshold=None)


@cache
def _answering(psycopg: Any) -> Any:
    """psycopg's connection, which is closed where the server is silent for too long."""

    class Answering(psycopg.Connection):  # type: ignore[misc]  # psycopg is loaded where it is needed
        waits = 0  # seconds that the next statement may take beside what an answer may

        def wait(self, gen: Generator[Any, Any, Any], *more: Any, **limits: Any) -> Any:
            return super().wait(self._limited(gen), *more, **limits)

        def _limited(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
            """The same exchange with the server; psycopg resumes it every tenth of a second while nothing comes."""
            seconds = self.waits + ANSWER_SECONDS
            deadline = time.monotonic() + seconds
            try:
                wants = next(gen)
                while True:
                    ready = yield wants
                    if ready:
                        deadline = time.monotonic() + seconds
                    elif time.monotonic() > deadline:
                        self.pgconn.finish()
                        raise psycopg.OperationalError(f"the server is silent for {seconds:.0f} seconds")
                    wants = gen.send(ready)
            except StopIteration as ended:
                return ended.value

    return Answering


def _close(engine: Engine, process: int) -> None:
    """End an engine's connections, in the process that made them."""
    if os.getpid() == process:
        engine.dispose()


def _driver(store: str) -> Any:
    try:
        import psycopg
        import psycopg.conninfo
    except ImportError as error:
        raise StoreError(f"store {store}: PostgreSQL needs psycopg ({error}): pip install 'turret[postgres]'") from None
    return psycopg
