"""A catalog in one SQLite file: transactions, one writer at a time, and one line for each error of SQLite.

The journal mode is WAL. A commit returns when it is on the disk.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import struct
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from turret.disk import make_file

BUSY_SECONDS = 60  # a writer waits this long for earlier writers
_SHARED_LOCK = (0x40000002, 510)  # the bytes of SQLite's shared lock: first, number (os_unix.c)


class Sqlite:
    """One SQLite file.

    Args:
        alone: no other process may have the file open. Then it can be read on a full disk.
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
    def _exclusive_engine(self) -> Engine:
        return _engine(self.path, self.read_only, alone=True, patience=0)

    def adding(self) -> AbstractContextManager[Connection]:
        """A transaction that adds to rows; here the only writer too."""
        return self.transaction(writes=True)

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Connection]:
        """Begin a transaction on one snapshot. If it writes, no other writing transaction runs until it ends.

        The first reader creates the WAL, and its index of 32 kB. If the disk is too full for the index, the transaction
        locks out other processes and keeps it in memory. If the disk has no inode left for the WAL, there is none to
        read, and the transaction locks out other processes and reads the file alone.
        """
        with ExitStack() as opened:
            if writes:
                yield opened.enter_context(self._engine.execution_options(turret_writes=True).begin())
            else:
                yield self._begin_reading(opened)

    def _begin_reading(self, opened: ExitStack) -> Connection:
        """Begin a transaction that has read something and ends with `opened`."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return _begin_transaction(self._engine, opened)
            except (DatabaseError, sqlite3.Error) as error:
                disk_full = any(words in str(error) for words in ("I/O", "is full"))
                no_file = "unable to open" in str(error) and no_inodes(self.path)
                if self._alone or self.read_only or not (disk_full or no_file):
                    raise
            try:
                if no_file and not self._wal.exists():
                    return self._begin_frozen(opened)
                return _begin_transaction(self._exclusive_engine, opened)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            except (DatabaseError, sqlite3.Error) as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0.001, 0.02))  # random, so that two exclusive readers do not block each other

    @property
    def _wal(self) -> Path:
        return self.path.with_name(f"{self.path.name}-wal")

    def _begin_frozen(self, opened: ExitStack) -> Connection:
        """Begin a transaction that creates no file and ends with `opened`; no other process opens the file meanwhile.

        Who has the file open has a WAL and holds SQLite's shared lock. So without a WAL the file is complete.

        Raises:
            BlockingIOError: another process has the file open.
        """
        import fcntl  # Windows has neither it nor inodes

        with ExitStack() as trying:
            handle = os.open(self.path, os.O_RDWR)
            trying.callback(os.close, handle)
            # struct flock: a lock of the open file, because locks of a process end with its first close of the file.
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, *_SHARED_LOCK, 0)
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, lock)
            if self._wal.exists():
                raise BlockingIOError(f"{self.path} was opened by another process")
            engine = _engine(self.path, read_only=True, alone=False)
            connection = _begin_transaction(engine, trying)
            opened.push(trying.pop_all())
        return connection

    def identity(self, _connection: Connection) -> None:
        """Return None: a folder store needs no id, because its files are in the same folder."""
        return

    def identify(self, _connection: Connection) -> None:
        """Do nothing."""

    def writable(self, _connection: Connection) -> bool:
        """Whether this process may write."""
        return not self.read_only

    def damage(self, connection: Connection) -> Iterator[str]:
        """Yield the problems that SQLite finds in the file."""
        for (problem,) in connection.exec_driver_sql("PRAGMA quick_check(5)"):
            if problem != "ok":
                yield f"{problem}: restore it from a copy"
        for row in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            yield f"a row of {row[0]} refers to a missing row of {row[2]}"

    def describe_error(self, reason: str) -> str:
        """Translate an error of SQLite into one line with a remedy."""
        path = self.path
        if "is full" in reason or ("disk I/O error" in reason and no_room(path)):
            return "its disk is full: free some space and try again; stored versions are intact"
        if "disk I/O error" in reason:
            return (
                f"the disk does not read or write {path.name} ({reason}): check quotas, file-size limits and the "
                "health of the disk; stored versions are intact"
            )
        if "readonly" in reason or "read-only" in reason:
            return "it is read-only here: give write permission, or use another --store"
        if "unable to open" in reason and no_inodes(path):
            return (
                "its disk has no room for another file (no free inode): remove some files and try again; stored "
                "versions are intact"
            )
        if "unable to open" in reason:
            return f"cannot open {path.name}: check that the folder exists and is writable"
        if "not a database" in reason or "malformed" in reason:
            return f"{path.name} is not a turret store or is damaged: restore it from a copy, or use another --store"
        if "locked" in reason:
            return f"another process has locked it for {BUSY_SECONDS} seconds: wait for that process, or end it"
        return reason.replace("\n", " ")

    def is_outage(self, reason: str) -> bool:
        """Whether the same may succeed later: another process holds a lock."""
        return "locked" in reason


def no_room(path: Path) -> bool:
    """Whether the disk is too full for SQLite to open a database in WAL mode."""
    return shutil.disk_usage(path.parent).free < 1 << 16


def no_inodes(path: Path) -> bool:
    """Whether no file can be created beside `path`, though there may be free space. False where that is not told."""
    try:
        found = os.statvfs(path.parent)
    except (OSError, AttributeError):
        return False
    return found.f_files > 0 and found.f_favail == 0


def _begin_transaction(engine: Engine, opened: ExitStack) -> Connection:
    """Begin a transaction that ends with `opened`, and read once: BEGIN alone does not touch the file."""
    with ExitStack() as trying:
        connection = trying.enter_context(engine.begin())
        connection.exec_driver_sql("SELECT 1 FROM sqlite_master LIMIT 1")
        opened.push(trying.pop_all())
    return connection


def _engine(path: Path, read_only: bool, alone: bool, patience: float = BUSY_SECONDS) -> Engine:
    def connect() -> sqlite3.Connection:
        address = f"file:{quote(str(path.absolute()))}"
        if read_only:
            # Without a -wal file there is no writer now, and SQLite needs no files that it may not create.
            immutable = "" if path.with_name(path.name + "-wal").exists() else "&immutable=1"
            address += f"?mode=ro{immutable}"
        else:
            make_file(path)  # SQLite gives -wal and -shm the same permissions
        # isolation_level=None: `_begin` opens transactions, instead of the driver.
        return sqlite3.connect(address, uri=True, timeout=patience, isolation_level=None, check_same_thread=False)

    engine = create_engine("sqlite+pysqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _entry: ConnectionPoolEntry) -> None:
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
    """Switch to WAL and wait for the lock, which SQLite does not do: two processes may create the file at once."""
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
