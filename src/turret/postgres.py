"""A catalog on PostgreSQL: transactions, one writer at a time, and one line for each error of the server.

- A writer holds one advisory lock of the database until its transaction ends, and sees everything that was committed
  before it got the lock (READ COMMITTED). So there is one writer at a time, as with SQLite.
- A transaction that only adds to sums takes no part in that: it locks its rows, in one order. So servers that count
  what they answer do not wait for each other, and a promote does not wait for them.
- A reader sees one snapshot (REPEATABLE READ) and waits for no other transaction.
- If a client disappears in a transaction, the server ends that transaction within `IDLE_SECONDS`. The next writer waits
  longer than that. The server rolls the transaction back and frees the lock. So a writing transaction must not wait
  for anything else, such as an object store. A client that was stopped while it waited for the lock gets it all the
  same, and loses it after `TAKE_SECONDS`.
- A process reuses a connection for a minute. Before each transaction it checks that the server still has the
  connection. A forked process opens its own.
- If the server is silent for `ANSWER_SECONDS` by the client's clock, the client closes the connection. A time limit of
  the server does not help if the server is stopped, and one of TCP does not help if the server's kernel still answers.
"""

from __future__ import annotations

import os
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import Connection, Engine, create_engine

from turret.errors import StoreError, require_package

if TYPE_CHECKING:
    import psycopg
    from psycopg.abc import RV, ConnDict, PQGen
    from psycopg.rows import TupleRow
    from psycopg.types.string import StrDumperUnknown

LOCK = 0x747572726574  # "turret"; all schemas of a database share it
BUSY_SECONDS = 60  # a writer waits this long for earlier writers
IDLE_SECONDS = 30  # the server ends a writing transaction whose client is silent for this long
TAKE_SECONDS = 5  # the same, from getting the lock until the client says that it has it
CONNECT_SECONDS = 10
ANSWER_SECONDS = 20.0  # for a statement, in addition to the wait for earlier writers
REUSED_SECONDS = 60  # a connection is closed at this age, before a firewall forgets it
POOL_SIZE = 2  # connections that a process keeps open; further ones are closed after their transaction
_SECRETS = ("password", "sslpassword")
_DEFAULTS: ConnDict = {
    "connect_timeout": CONNECT_SECONDS,
    "application_name": "turret",
    "client_encoding": "utf-8",
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": int(1000 * ANSWER_SECONDS),
}


class Postgres:
    """The database of one server. It connects at the first transaction.

    Attributes:
        store: the URL without its password, for errors.
    """

    read_only = False
    name = "catalog"

    def __init__(self, url: str, shown: str, *, busy_seconds: int = BUSY_SECONDS) -> None:
        self.store = shown
        self._url = url
        self._busy_seconds = busy_seconds
        # By process: after a fork the parent's engine stays here unused, because closing it would close the parent's
        # connections.
        self._engines: dict[int, Engine] = {}

    @property
    def _engine(self) -> Engine:
        process = os.getpid()
        if process not in self._engines:
            _require_psycopg(self.store)
            engine = create_engine(
                "postgresql+psycopg://",
                creator=partial(_connect, self._url, self.store),
                pool_size=POOL_SIZE,
                max_overflow=-1,
                pool_pre_ping=True,
                pool_recycle=REUSED_SECONDS,
                use_native_hstore=False,
            )
            self._engines[process] = engine
            weakref.finalize(self, _close, engine, process)
        return self._engines[process]

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Connection]:
        """Begin a transaction on one snapshot. If it writes, no other writing transaction runs until it ends."""
        level = "READ COMMITTED" if writes else "REPEATABLE READ"
        engine = self._engine.execution_options(isolation_level=level, postgresql_readonly=not writes)
        with engine.begin() as connection:
            if writes:
                self._wait_for_writers(connection)
            yield connection

    @contextmanager
    def adding(self) -> Iterator[Connection]:
        """Begin a transaction beside other writers; a statement sees what was committed before it."""
        engine = self._engine.execution_options(isolation_level="READ COMMITTED", postgresql_readonly=False)
        with engine.begin() as connection:
            _limit_waits(connection, int(ANSWER_SECONDS / 2), IDLE_SECONDS)
            yield connection

    def _wait_for_writers(self, connection: Connection) -> None:
        _limit_waits(connection, self._busy_seconds, TAKE_SECONDS)
        driver: _WaitsForLock | None = connection.connection.driver_connection
        assert driver is not None
        driver.lock_seconds = self._busy_seconds
        try:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        finally:
            driver.lock_seconds = 0
        # ALTER TABLE waits for readers of the table, and ends before the client's time for an answer.
        _limit_waits(connection, int(ANSWER_SECONDS / 2), IDLE_SECONDS)

    def identity(self, connection: Connection) -> str | None:
        """Return the id of this catalog, which no other catalog has; None if it was lost.

        It is the comment on the table `alembic_version`, so a dump contains it.
        """
        found = connection.exec_driver_sql("SELECT obj_description('alembic_version'::regclass, 'pg_class')").scalar()
        return None if found is None else str(found)

    def identify(self, connection: Connection) -> None:
        """Give the catalog an id if it has none."""
        if self.identity(connection) is None:
            connection.exec_driver_sql(f"COMMENT ON TABLE alembic_version IS '{uuid.uuid4()}'")

    def writable(self, connection: Connection) -> bool:
        """Whether this user may write to this server."""
        query = "SELECT has_table_privilege('versions', 'INSERT') AND NOT pg_is_in_recovery()"
        return bool(connection.exec_driver_sql(query).scalar())

    def damage(self, _connection: Connection) -> Iterator[str]:
        """Yield nothing: PostgreSQL checks its own files and references."""
        yield from ()

    def describe_error(self, reason: str) -> str:
        """Translate an error of the server into one line with a remedy and without a password."""
        for key in _SECRETS:
            if secret := _parameters(self._url, self.store).get(key):
                reason = reason.replace(str(secret), "***")
        first = reason.strip().partition("\n")[0].removesuffix("?").strip()
        explanation, _ = _explain(reason)
        return explanation.format(first=first, seconds=self._busy_seconds)

    def is_outage(self, reason: str) -> bool:
        """Whether the same may succeed later: the server was not there, or another process held it up."""
        return _explain(reason)[1]


def _limit_waits(connection: Connection, lock: int, idle: int) -> None:
    """Limit the seconds of a wait for a lock, and of a transaction whose client is silent."""
    limits = f"'lock_timeout', '{lock}s', true), set_config('idle_in_transaction_session_timeout', '{idle}s', true"
    connection.exec_driver_sql(f"SELECT set_config({limits})")


class _WaitsForLock(Protocol):
    """A connection whose next statement may take `lock_seconds` longer than `ANSWER_SECONDS`."""

    lock_seconds: int


_ERRORS = (  # words of an error, its explanation and remedy, and whether the same may succeed later
    (("lock timeout",), "another process has locked it for {seconds} seconds: wait for that process, or end it", True),
    (
        ("the server is silent",),
        "{first}: check the server, the network, and whether the change was made; then try again",
        True,
    ),
    (
        ("password", "Peer authentication", "no pg_hba.conf entry"),
        "{first}: set PGPASSWORD or ~/.pgpass, or ask for access",
        False,
    ),
    (("does not exist",), "{first}: create it, or correct the URL", False),
    (("permission denied", "must be owner"), "{first}: grant it, or connect as another user", False),
    (("read-only transaction",), "this server is read-only: connect to the primary server", False),
    (("No space left", "disk full"), "the server's disk is full ({first}): free some space there and try again", True),
    (("too many clients", "remaining connection slots"), "{first}: try again, or raise max_connections", True),
    (
        (
            "terminating connection",
            "server closed",
            "connection is lost",
            "connection has been closed",
            "idle-in-trans",
        ),
        "the connection was lost ({first}): check whether the change was made, then try again",
        True,
    ),
    (
        ("connection failed", "connection to server", "could not translate", "failed to resolve", "timeout expired"),
        "cannot be reached ({first}): check host and port, and that the server runs",
        True,
    ),
)


def _explain(reason: str) -> tuple[str, bool]:
    """What a user is told of an error, and whether the same may succeed later."""
    found = (each[1:] for each in _ERRORS if any(word in reason for word in each[0]))
    return next(found, ("{first}", False))


def _parameters(url: str, store: str) -> ConnDict:
    """Parse the URL into libpq's keys; raises StoreError."""
    _require_psycopg(store)
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        return conninfo_to_dict(url)
    except psycopg.ProgrammingError:  # raised again below, because its text has the URL with the password
        pass
    raise StoreError(
        f"store {store}: PostgreSQL cannot read this URL: expected files, local and keys of libpq, a number as port, "
        "and percent-encoded special characters"
    )


def _connect(url: str, store: str) -> psycopg.Connection[TupleRow]:
    from psycopg.conninfo import make_conninfo

    parameters: ConnDict = {**_DEFAULTS, **_parameters(url, store)}
    connection = _connection_class().connect(make_conninfo("", **parameters), prepare_threshold=None)
    connection.adapters.register_dumper(str, _text_dumper())
    return connection


def plain_text(text: str) -> str:
    """The text as PostgreSQL stores it, which has no NUL and no half characters: each becomes U+FFFD."""
    return text.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@cache
def _text_dumper() -> type[StrDumperUnknown]:
    """Writes every text of Python as `plain_text` does.

    A client may send any text as a name. Nothing that is stored has such a name, so nothing is found by it.
    """
    from psycopg.types.string import StrDumperUnknown

    class TextDumper(StrDumperUnknown):
        def dump(self, obj: str) -> bytes:
            return plain_text(obj).encode()

    return TextDumper


@cache
def _connection_class() -> type[psycopg.Connection[TupleRow]]:
    """A subclass of psycopg's connection that is closed if the server is silent for too long."""
    import psycopg  # optional, and loaded with the first connection
    from psycopg.rows import TupleRow

    class TimedConnection(psycopg.Connection[TupleRow]):
        lock_seconds = 0  # see `_WaitsForLock`

        # Any: the further arguments depend on psycopg's version, and are passed through.
        def wait(self, gen: PQGen[RV], *more: Any, **named: Any) -> RV:
            return super().wait(self._time_exchange(gen), *more, **named)

        def _time_exchange(self, gen: PQGen[RV]) -> PQGen[RV]:
            """Run the exchange `gen` with the server; psycopg resumes it every 0.1 s while nothing arrives."""
            seconds = self.lock_seconds + ANSWER_SECONDS
            deadline = time.monotonic() + seconds
            try:
                wait_for = next(gen)
                while True:
                    ready = yield wait_for
                    if ready:
                        deadline = time.monotonic() + seconds
                    elif time.monotonic() > deadline:
                        self.pgconn.finish()
                        raise psycopg.OperationalError(f"the server is silent for {seconds:.0f} seconds")
                    wait_for = gen.send(ready)
            except StopIteration as ended:
                return ended.value

    return TimedConnection


def _close(engine: Engine, process: int) -> None:
    """Close the connections of an engine, in the process that opened them."""
    if os.getpid() == process:
        engine.dispose()


def _require_psycopg(store: str) -> None:
    with require_package(f"store {store}: PostgreSQL", "psycopg", "pip install 'turret[postgres]'", StoreError):
        import psycopg  # noqa: F401
