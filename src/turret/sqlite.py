"""How SQLite is opened, written to by one at a time, and understood when it complains. Refuses to know tables.

The journal is WAL and a commit is on the disk before it returns.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from turret.disk import make_file

BUSY_SECONDS = 60  # how long a writer waits for the writers before it


class Sqlite:
    """One SQLite file.

    alone: no other process may have it open meanwhile; then it can be read on a disk without a byte to spare.
    """

    def __init__(self, path: Path, *, read_only: bool = False, alone: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self.store = str(path.parent)
        self.name = path.name
        self._alone = alone

    @cached_property
    def _engine(self) -> Engine:
        return _engine(self.path, self.read_only, self._alone)

    @cached_property
    def _without_room(self) -> Engine:
        return _engine(self.path, self.read_only, alone=True, patience=0)

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Connection]:
        """A transaction that sees one moment; one that writes is the only such until it ends.

        Where the disk refuses the index of the WAL, 32 kB that the first of all readers makes, because it is full say,
        one that reads is alone for as long as it takes and keeps the index in memory.
        """
        with ExitStack() as opened:
            if writes:
                yield opened.enter_context(self._engine.execution_options(turret_writes=True).begin())
            else:
                yield self._look(opened)

    def _look(self, opened: ExitStack) -> Connection:
        """A transaction that has read something and ends with `opened`."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return _looked(self._engine, opened)
            except (DatabaseError, sqlite3.Error) as error:
                refused = any(said in str(error) for said in ("I/O", "is full"))
                if self._alone or self.read_only or not refused:
                    raise
            try:
                return _looked(self._without_room, opened)
            except (DatabaseError, sqlite3.Error) as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0.001, 0.02))  # two that both would be alone: neither may wait for the other

    def identity(self, _connection: Connection) -> None:
        """None: the files are in the same folder."""
        return

    def identify(self, _connection: Connection) -> None:
        """Nothing to do."""

    def writable(self, _connection: Connection) -> bool:
        """Whether this process may write."""
        return not self.read_only

    def damage(self, connection: Connection) -> Iterator[str]:
        """What the file itself has wrong."""
        for (said,) in connection.exec_driver_sql("PRAGMA quick_check(5)"):
            if said != "ok":
                yield f"{said}: restore it from a copy"
        for row in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            yield f"a row of {row[0]} refers to a row of {row[2]} that is not there"

    def plainly(self, reason: str) -> str:
        """What it complains of, and what to do."""
        path = self.path
        if "is full" in reason or ("disk I/O error" in reason and no_room(path)):
            return f"the disk of {path.parent} is full: free some space and try again; what was stored before is intact"
        if "disk I/O error" in reason:
            return (
                f"the disk refuses to read or write {path.name} ({reason}): look at quotas, file-size limits and its "
                "health; what was stored before is intact"
            )
        if "readonly" in reason or "read-only" in reason:
            return "it is read-only here: give write permission, or use another --store"
        if "unable to open" in reason:
            return f"cannot open {path.name}: check that the folder exists and may be written"
        if "not a database" in reason or "malformed" in reason:
            return f"{path.name} is not a turret store or is damaged: restore it from a copy, or use another --store"
        if "locked" in reason:
            return f"another process has held it for {BUSY_SECONDS} seconds: wait for it, or end it"
        return reason.replace("\n", " ")


def no_room(path: Path) -> bool:
    """Whether the disk is too full for SQLite to open a database that is in WAL mode."""
    return shutil.disk_usage(path.parent).free < 1 << 16


def _looked(engine: Engine, opened: ExitStack) -> Connection:
    """A transaction of `engine` that goes with `opened`, once it has read: BEGIN alone reads nothing."""
    with ExitStack() as trying:
        connection = trying.enter_context(engine.begin())
        connection.exec_driver_sql("SELECT 1 FROM sqlite_master LIMIT 1")
        opened.push(trying.pop_all())
    return connection


def _engine(path: Path, read_only: bool, alone: bool, patience: float = BUSY_SECONDS) -> Engine:
    if read_only:
        # Without a -wal beside it nobody is writing, and SQLite can do without the files it may not create.
        still = "" if path.with_name(path.name + "-wal").exists() else "&immutable=1"
        address = f"file:{quote(str(path.absolute()))}?mode=ro{still}"
    else:
        address = f"file:{quote(str(path.absolute()))}"

    def connect() -> sqlite3.Connection:
        if not read_only:
            make_file(path)  # SQLite gives -wal and -shm its permissions
        # isolation_level=None: transactions are opened below, not guessed by the driver from the statement.
        return sqlite3.connect(address, uri=True, timeout=patience, isolation_level=None, check_same_thread=False)

    engine = create_engine("sqlite+pysqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: Any) -> None:
        connection.execute("PRAGMA foreign_keys = ON")
        if alone:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # the index of the WAL stays in memory
        if not read_only:
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("turret_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(connection: sqlite3.Connection) -> None:
    """Two processes that create the file at once: the switch to WAL does not wait for its lock, so this does."""
    if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
        return
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
