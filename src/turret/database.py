"""The store's tables, and the one way to a connection. Refuses to know what a version or a run means.

The schema, in bullets (its number is `SCHEMA`; every change is a new Alembic file in `migrations/versions`):

- `adapters`: a row a name; `last_number` is the last number given out, so that a number is never used twice
- `versions`: a row a stored version, never changed after it is written; `manifest` and `metrics` are JSON
- `files`: which content (sha256) a version has under which path
- `aliases`: where a movable name points now
- `alias_history`: every move, append-only; `number` is the version's, and stays when the version is deleted and
  `version_id` becomes NULL (both NULL: the alias was taken away); `verb` is promote, rollback or delete; `before` is
  the move that a rollback from here goes back to
- `gates`: what a version's metrics must reach before an alias may be moved to it
- `golden_sets`: examples with what an answer to them must be, as JSON lines under their sha256; never changed
- `golden_gates`: which of these sets an alias asks for, and the share of it that must pass
- `replays`: how the version of that digest did on such a set, append-only; the newest of a set counts
- `experiments`: a row an experiment, with its arms by number and digest, and what it ended with; one a name is running
- `experiment_splits`: which points belong to which arm, a row a change, append-only; the newest counts
- `experiment_events`: its history, append-only
- `assignments`: an answer of an experiment: the unit (hashed), the arm and the probability; `first` is 1 for the first
  one of its unit; append-only
- `outcomes`: what came of an answer; `counted` is 1 for the first of its unit, which the evidence is made of;
  append-only
- `experiment_health`: answers, errors, slow ones and seconds of an arm, a shadow's agreements, of a moment; append-only
- `runs`: a row a training; `state` is running, interrupted, failed or finished; the version it made has its `run`

Times are ISO 8601 in UTC, as text; `who` is the user that did it, NULL where that is not known. On SQLite the journal
is WAL and a commit is on disk before it returns.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from turret.errors import StoreError

SCHEMA = "0005"  # the newest file in migrations/versions; a test holds the two together
BUSY_SECONDS = 60  # how long a writer waits for the writers before it

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("last_number", Integer, nullable=False),
    Column("created", String(32), nullable=False),
)
versions = Table(
    "versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", ForeignKey(adapters.c.id), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(80), nullable=False, index=True),
    Column("created", String(32), nullable=False),
    Column("run", String(40), index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("who", String(100)),
    UniqueConstraint("adapter_id", "number"),
    UniqueConstraint("adapter_id", "digest"),
)
files = Table(
    "files",
    metadata,
    Column("version_id", ForeignKey(versions.c.id), primary_key=True),
    Column("path", String(255), primary_key=True),
    Column("digest", String(80), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
)
aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", ForeignKey(adapters.c.id), primary_key=True),
    Column("alias", String(32), primary_key=True),
    Column("version_id", ForeignKey(versions.c.id), nullable=False, index=True),
    Column("moved", String(32), nullable=False),
)
alias_history = Table(
    "alias_history",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", ForeignKey(adapters.c.id), nullable=False, index=True),
    Column("alias", String(32), nullable=False),
    Column("version_id", ForeignKey(versions.c.id)),
    Column("moved", String(32), nullable=False),
    Column("number", Integer),
    Column("verb", String(16)),
    Column("before", Integer),
    Column("who", String(100)),
)
gates = Table(
    "gates",
    metadata,
    Column("adapter_id", ForeignKey(adapters.c.id), primary_key=True),
    Column("alias", String(32), primary_key=True),
    Column("split", String(100), primary_key=True),
    Column("metric", String(200), primary_key=True),
    Column("relation", String(2), primary_key=True),
    Column("threshold", Float, nullable=False),
    Column("created", String(32), nullable=False),
)
golden_sets = Table(
    "golden_sets",
    metadata,
    Column("digest", String(80), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("examples", Integer, nullable=False),
    Column("content", Text, nullable=False),
    Column("created", String(32), nullable=False),
)
golden_gates = Table(
    "golden_gates",
    metadata,
    Column("adapter_id", ForeignKey(adapters.c.id), primary_key=True),
    Column("alias", String(32), primary_key=True),
    Column("golden", ForeignKey(golden_sets.c.digest), primary_key=True),
    Column("share", Float, nullable=False),
    Column("created", String(32), nullable=False),
)
replays = Table(
    "replays",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", String(80), nullable=False, index=True),
    Column("golden", ForeignKey(golden_sets.c.digest), nullable=False),
    Column("passed", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("first", JSON),
    Column("replayed", String(32), nullable=False),
)
runs = Table(
    "runs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(100), nullable=False),
    Column("state", String(16), nullable=False),
    Column("recipe_digest", String(80), nullable=False, index=True),
    Column("data_digest", String(80), nullable=False),
    Column("created", String(32), nullable=False),
    Column("ended", String(32)),
    Column("error", Text),
    Column("result", JSON),
)
experiments = Table(
    "experiments",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", ForeignKey(adapters.c.id), nullable=False),
    Column("number", Integer, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("alias", String(32), nullable=False),
    Column("salt", String(64), nullable=False),
    Column("settings", JSON, nullable=False),
    Column("arms", JSON, nullable=False),
    Column("created", String(32), nullable=False),
    Column("who", String(100)),
    Column("ended", String(32)),
    Column("verdict", JSON),
    UniqueConstraint("adapter_id", "number"),
)
experiment_splits = Table(
    "experiment_splits",
    metadata,
    Column("experiment_id", ForeignKey(experiments.c.id), primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("segments", JSON, nullable=False),
    Column("created", String(32), nullable=False),
)
experiment_events = Table(
    "experiment_events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("experiment_id", ForeignKey(experiments.c.id), nullable=False, index=True),
    Column("verb", String(16), nullable=False),
    Column("detail", JSON, nullable=False),
    Column("at", String(32), nullable=False),
    Column("who", String(100)),
)
assignments = Table(
    "assignments",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("experiment_id", ForeignKey(experiments.c.id), nullable=False),
    Column("unit", String(32), nullable=False),
    Column("receipt", String(100), unique=True),
    Column("arm", String(16), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("probability", Float, nullable=False),
    Column("first", Integer, nullable=False),
    Column("at", String(32), nullable=False),
    Index(None, "experiment_id", "unit"),
)
outcomes = Table(
    "outcomes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey(assignments.c.id), nullable=False, unique=True),
    Column("experiment_id", ForeignKey(experiments.c.id), nullable=False),
    Column("unit", String(32), nullable=False),
    Column("arm", String(16), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("value", Float, nullable=False),
    Column("counted", Integer, nullable=False),
    Column("at", String(32), nullable=False),
    Index(None, "experiment_id", "unit"),
)
experiment_health = Table(
    "experiment_health",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("experiment_id", ForeignKey(experiments.c.id), nullable=False, index=True),
    Column("arm", String(16), nullable=False),
    Column("answers", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("slow", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("compared", Integer, nullable=False),
    Column("agreed", Integer, nullable=False),
    Column("at", String(32), nullable=False),
)


class Database:
    """One SQLite file: `reading()` and `writing()` are its only doors, each a transaction.

    alone: no other process may have it open meanwhile; then it can be read on a disk without a byte to spare.
    """

    def __init__(self, path: Path, *, read_only: bool = False, alone: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._engine = _engine(path, read_only, alone)
        self._without_room = self._engine if alone or read_only else _engine(path, read_only, alone=True, patience=0)
        with told(path):
            self._reach_schema()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one moment of the database."""
        with told(self.path), self._seen() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A connection that is the only writer until it commits, or leaves everything as it was."""
        if self.read_only:
            raise StoreError(
                f"store {self.path.parent} is read-only here: give write permission, or use another --store"
            )
        writer = self._engine.execution_options(turret_writes=True)
        with told(self.path), writer.begin() as connection:
            yield connection

    @contextmanager
    def _seen(self) -> Iterator[Connection]:
        """A transaction that has read something.

        Where the disk refuses the index of the WAL, 32 kB that the first of all readers makes, because it is full say,
        this one is alone for as long as it takes and keeps the index in memory.
        """
        with ExitStack() as opened:
            yield self._look(opened)

    def _look(self, opened: ExitStack) -> Connection:
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return _looked(self._engine, opened)
            except (DatabaseError, sqlite3.Error) as error:
                if self._without_room is self._engine or not any(said in str(error) for said in ("I/O", "is full")):
                    raise
            try:
                return _looked(self._without_room, opened)
            except (DatabaseError, sqlite3.Error) as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0.001, 0.02))  # two that both would be alone: neither may wait for the other

    def _reach_schema(self) -> None:
        with self._seen() as connection:
            found = _schema_of(connection)
        if found == SCHEMA:
            return
        if found is not None and found > SCHEMA:
            raise StoreError(
                f"store {self.path.parent} has format {found}, this turret reads up to {SCHEMA}: "
                "it was written by a newer turret; upgrade turret, or use another --store"
            )
        if self.read_only:
            raise StoreError(
                f"store {self.path.parent} has format {found}, this turret reads {SCHEMA}, and it is read-only here: "
                "run `turret list` once where it may be written, which brings it up to date"
            )
        with self.writing() as connection:
            if _schema_of(connection) != SCHEMA:  # nobody else brought it there while this process waited
                _migrate(connection)


def _looked(engine: Engine, opened: ExitStack) -> Connection:
    """A transaction of `engine` that goes with `opened`, once it has read: BEGIN alone reads nothing."""
    with ExitStack() as trying:
        connection = trying.enter_context(engine.begin())
        connection.exec_driver_sql("SELECT 1 FROM sqlite_master LIMIT 1")
        opened.push(trying.pop_all())
    return connection


def _schema_of(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _migrate(connection: Connection) -> None:
    from alembic import command  # slow to import, and needed only for a new or an older store
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _engine(path: Path, read_only: bool, alone: bool, patience: float = BUSY_SECONDS) -> Engine:
    if read_only:
        # Without a -wal beside it nobody is writing, and SQLite can do without the files it may not create.
        still = "" if path.with_name(path.name + "-wal").exists() else "&immutable=1"
        address = f"file:{quote(str(path.absolute()))}?mode=ro{still}"
    else:
        address = f"file:{quote(str(path.absolute()))}"

    def connect() -> sqlite3.Connection:
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


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what the disk and the database say into one line that names the store."""
    try:
        yield
    except (DatabaseError, sqlite3.Error) as error:
        reason = str(getattr(error, "orig", None) or error)
        raise StoreError(f"store {path.parent}: {_plainly(reason, path)}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise StoreError(
            f"store {path.parent}: {path.name} holds a row that is no JSON ({error}): restore it from a copy"
        ) from error
    except OSError as error:
        raise StoreError(f"store {path.parent}: {error.strerror or error}: {error.filename or path}") from error


def no_room(path: Path) -> bool:
    """Whether the disk is too full for SQLite to open a database that is in WAL mode."""
    return shutil.disk_usage(path.parent).free < 1 << 16


def _plainly(reason: str, path: Path) -> str:
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
