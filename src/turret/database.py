"""The store's tables, and the one way to a connection. Refuses to know what a version or a run means.

The schema, in bullets (its number is `SCHEMA`; every change is a new Alembic file in `migrations/versions`):

- `adapters`: a row a name; `last_number` is the last number given out, so that a number is never used twice
- `versions`: a row a stored version, never changed after it is written; `manifest` and `metrics` are JSON
- `files`: which content (sha256) a version has under which path; `upload` is which copy of it (`turret.store.uploads`),
  one for all versions that have it, and empty for those that format 0005 wrote
- `uploads`: puts that are writing files; `since` is when the last file was begun
- `aliases`: where a movable name points now
- `alias_history`: every move, append-only; `number` is the version's, and stays when the version is deleted and
  `version_id` becomes NULL (both NULL: the alias was taken away); `verb` is promote, rollback or delete; `before` is
  the move that a rollback from here goes back to
- `gates`: what a version's metrics must reach before an alias may be moved to it
- `golden_sets`: examples with what an answer to them must be, as JSON lines under their sha256; never changed
- `golden_gates`: which of these sets an alias asks for, and the share of it that must pass
- `replays`: how the version of that digest did on such a set, append-only; the newest of a set counts
- `tokens`: who may ask a server; `hash` is of the token, which is kept nowhere; quotas are a minute, NULL for none
- `experiments`: a row an experiment, with its arms by number and digest, and what it ended with; one a name is running
- `experiment_splits`: which points belong to which arm, a row a change, append-only; the newest counts
- `experiment_events`: its history, append-only
- `assignments`: an answer of an experiment: the unit (hashed), the arm and the probability; `first` is 1 for the first
  one of its unit; append-only
- `outcomes`: what came of an answer; `counted` is 1 for the first of its unit, which the evidence is made of;
  append-only
- `experiment_health`: answers, errors, slow ones and seconds of an arm, a shadow's agreements, of a moment; append-only
- `runs`: a row a training; `state` is running, interrupted, failed or finished; the version it made has its `run`

Times are ISO 8601 in UTC, as text; `who` is the user that did it, NULL where that is not known. Names order by their
bytes, on PostgreSQL too (`bytewise`).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    text,
)
from sqlalchemy.exc import DBAPIError

from turret.disk import describe_error
from turret.errors import StoreError
from turret.location import Location
from turret.postgres import Postgres
from turret.sqlite import Sqlite

SCHEMA = "0006"  # the newest file in migrations/versions; a test holds the two together

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)


def bytewise(length: int) -> String:
    """Text that orders by its bytes, whatever language a server speaks."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", bytewise(100), nullable=False, unique=True),
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
    Column("path", bytewise(255), primary_key=True),
    Column("digest", String(80), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("upload", String(32), nullable=False),
)
uploads = Table(
    "uploads",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("since", String(32), nullable=False),
)
aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", ForeignKey(adapters.c.id), primary_key=True),
    Column("alias", bytewise(32), primary_key=True),
    Column("version_id", ForeignKey(versions.c.id), nullable=False, index=True),
    Column("moved", String(32), nullable=False),
)
alias_history = Table(
    "alias_history",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", ForeignKey(adapters.c.id), nullable=False, index=True),
    Column("alias", bytewise(32), nullable=False),
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
    Column("alias", bytewise(32), primary_key=True),
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
    Column("alias", bytewise(32), primary_key=True),
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
tokens = Table(
    "tokens",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("hash", String(80), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("created", String(32), nullable=False),
    Column("revoked", String(32)),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
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
    """One catalog: `reading()` and `writing()` are its only doors, each a transaction.

    where: a file of SQLite, or a location on PostgreSQL; made where there is none yet.
    alone: no other process may have the file open meanwhile; then it can be read on a disk without a byte to spare.
    """

    def __init__(
        self, where: Path | Location, *, read_only: bool = False, alone: bool = False, server: Postgres | None = None
    ) -> None:
        self._where = where
        self._server = server or _server(where, read_only=read_only, alone=alone)
        with told(where):
            self._reach_schema()

    @classmethod
    def found(cls, where: Path | Location) -> Database | None:
        """The catalog that is there, or None; nothing is made."""
        with told(where):
            if isinstance(where, Path):
                if not where.exists():
                    return None
                return cls(where, read_only=not (os.access(where.parent, os.W_OK) and os.access(where, os.W_OK)))
            server = _on_server(where)
            with server.transaction(writes=False) as connection:
                if _schema_of(connection) is None:
                    return None
        return cls(where, server=server)

    @property
    def name(self) -> str:
        """What a problem of the catalog itself is said to be in."""
        return self._server.name

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one moment of the database."""
        with told(self._where), self._server.transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A connection that is the only writer until it commits, or leaves everything as it was."""
        if self._server.read_only:
            raise StoreError(
                f"store {self._server.store} is read-only here: give write permission, or use another --store"
            )
        with told(self._where), self._server.transaction(writes=True) as connection:
            yield connection

    def identity(self) -> str | None:
        """What tells this catalog from every other; None where its files are in its own folder, or it was lost."""
        with self.reading() as connection:
            return self._server.identity(connection)

    def writable(self) -> bool:
        """Whether it may be written from here."""
        with self.reading() as connection:
            return self._server.writable(connection)

    def damage(self, connection: Connection) -> Iterator[str]:
        """What the database itself says is wrong with it."""
        return self._server.damage(connection)

    def _reach_schema(self) -> None:
        store = self._server.store
        with self._server.transaction(writes=False) as connection:
            found = _schema_of(connection)
        if found == SCHEMA:
            return
        if found is not None and found > SCHEMA:
            raise StoreError(
                f"store {store} has format {found}, this turret reads up to {SCHEMA}: "
                "it was written by a newer turret; upgrade turret, or use another --store"
            )
        if self._server.read_only:
            raise StoreError(
                f"store {store} has format {found}, this turret reads {SCHEMA}, and it is read-only here: "
                "run `turret list` once where it may be written, which brings it up to date"
            )
        with self.writing() as connection:
            if _schema_of(connection) != SCHEMA:  # nobody else brought it there while this process waited
                _migrate(connection)
                self._server.identify(connection)


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


@contextmanager
def told(where: Path | Location) -> Iterator[None]:
    """Turn what the disk and the database say into one line that names the store."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        reason, server = str(getattr(error, "orig", None) or error), _server(where)
        raise StoreError(f"store {server.store}: {server.plainly(reason)}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        server = _server(where)
        raise StoreError(
            f"store {server.store}: {server.name} holds a row that is no JSON ({error}): restore it from a copy"
        ) from error
    except OSError as error:
        said = describe_error(error, where if isinstance(where, Path) else where.local)
        raise StoreError(f"store {_server(where).store}: {said}") from error


def _server(where: Path | Location, *, read_only: bool = False, alone: bool = False) -> Sqlite | Postgres:
    if isinstance(where, Path):
        return Sqlite(where, read_only=read_only, alone=alone)
    return _on_server(where)


def _on_server(where: Location) -> Postgres:
    assert where.catalog is not None
    return Postgres(where.catalog, where.shown)
