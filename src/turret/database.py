"""The tables of the catalog, and `Database`, which gives connections to them, each limited to what its tenant may see.

A new catalog is made of the tables below. Their schema has the number `SCHEMA`; each change of it is also a new Alembic
file in `migrations/versions`, which brings an older catalog up to date:

- `adapters`: a row per tenant and name; `last_number` is the last number given out, so no number is used twice
- `versions`: a row per stored version, never changed; `manifest` and `metrics` are JSON; `comparison` is the folder of
  the comparison or control study that trained it, NULL for a version of its own, and becomes NULL when `production`
  first names it or the same content is stored as a version of its own
- `files`: the content (sha256) at each path of a version; `upload` tells which copy of that content
  (`turret.store.uploads`), one for all versions, and empty for files of format 0005
- `uploads`: puts that are writing files; `since` is when the last file was started
- `aliases`: the version that an alias names
- `alias_history`: all moves of aliases, append-only; `number` is the version's and stays after the version is deleted,
  when `version_id` becomes NULL (both NULL: the alias was removed); `verb` is promote, rollback or delete; `before` is
  the move that a rollback returns to
- `gates`: limits on the metrics of a version that an alias may be moved to
- `golden_sets`: examples with their expected answers, as JSON lines, under the sha256 of these; never changed
- `golden_gates`: the golden sets of an alias, and the share of examples that must pass
- `replays`: results of a tenant's golden set on a version (by digest), append-only; the newest of a set counts
- `tokens`: access tokens of the server, each of a tenant, for the `adapters` and `bases` of these patterns; only the
  `hash` of a token is stored; after a rotation, `former_hash` stays valid until `former_until`; quotas are per minute;
  without `sign_in`, no person signs in by it
- `experiments`: number and digest of each arm's version, and the verdict at its end; one per name is running
- `experiment_splits`, `experiment_events`: points of each arm, of which the newest count; the history; append-only
- `assignments`: answers: the unit (hashed), its arm and probability; `first` is 1 for the unit's first; append-only
- `outcomes`: outcomes of answers; `counted` is 1 for the first of a unit, which the evidence uses; append-only
- `experiment_health`: what an arm answered in about one second, and how often a shadow agreed; append-only
- `panels`: a row per tenant and name of a list of questions; `production` is the number that the plain name means
- `panel_versions`: the questions of a panel's version as JSON, never changed
- `panel_moves`: all moves of `production` of panels, append-only, as `alias_history`
- `jobs`: a row per training, cell of a comparison and batch of requests (`turret.store.jobs`), with its `state`; the
  version of a training has the id in `run`
- `queue_limits`: how many trainings and cells of a tenant may run and wait; NULL for no limit
- `run_log`: lines of progress and errors of jobs, append-only
- described in `turret.store`: `leases`, `artifacts`, `job_turns`, `budgets`, `sessions`,
  `client_files`, `batches`, `batch_parts`, `usage`, `flushes`, `promises`, `promise_answers`, `promise_outcomes`,
  `promise_watches`, `promise_inputs`, `alarms`

A connection carries an `Access`; `turret.database` limits queries to it. Times are text, ISO 8601 in UTC. `who` is
the user of the change, NULL if unknown. Names are ordered by their bytes, on PostgreSQL too (`bytewise`).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    cast,
    false,
    func,
    insert,
    inspect,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TypeEngine

from turret.access import DEFAULT, OPERATOR, Access
from turret.disk import describe_error
from turret.errors import StoreError
from turret.json_types import Plain
from turret.location import Location
from turret.postgres import Postgres
from turret.sqlite import Sqlite

OLDEST, SCHEMA = "0012", "0022"  # the first and the newest file in migrations/versions, as a test checks
TRAINING, CELL, STUDY, BATCH = "training", "cell", "study", "batch"  # kinds of jobs
OPEN_STATES = ("waiting", "running")  # of a job that has not ended
LONGEST_NAME = 100  # characters of an adapter's name among sums of usage
LONGEST_RECEIPT = 120  # characters, of an answer that a promise covers
ACCESS = "turret_access"  # the execution option of a connection with its `Access`

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)


def bytewise(length: int) -> String:
    """A text column that is ordered by bytes, whatever the collation of the server."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


T = TypeVar("T")


def columns(kind: TypeEngine[T] | type[TypeEngine[T]], *names: str, nullable: bool = False) -> list[Column[T]]:
    """Columns of one type, which are never NULL unless `nullable`."""
    return [Column(name, kind, nullable=nullable) for name in names]


adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", bytewise(64), nullable=False, server_default=DEFAULT),
    Column("name", bytewise(100), nullable=False),
    Column("last_number", Integer, nullable=False),
    Column("created", String(32), nullable=False),
    UniqueConstraint("tenant", "name"),
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
    *columns(JSON, "metrics", "manifest"),
    Column("who", String(100)),
    Column("comparison", String(255)),
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
    *columns(Integer, "passed", "total"),
    Column("first", JSON),
    Column("replayed", String(32), nullable=False),
    Column("tenant", bytewise(64), nullable=False, server_default=DEFAULT),
)
tokens = Table(
    "tokens",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", bytewise(64), nullable=False, server_default=DEFAULT),
    Column("name", String(100), nullable=False),
    Column("hash", String(80), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("created", String(32), nullable=False),
    Column("revoked", String(32)),
    *columns(Integer, "requests_per_minute", "tokens_per_minute", nullable=True),
    *columns(JSON, "adapters", "bases", nullable=True),
    Column("expires", String(32)),
    Column("former_hash", String(80)),
    Column("former_until", String(32)),
    Column("sign_in", Boolean, nullable=False, server_default=true()),
    UniqueConstraint("tenant", "name"),
)
jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("kind", String(16), nullable=False, server_default="training"),
    Column("name", String(100), nullable=False),
    Column("state", String(16), nullable=False),
    Column("recipe_digest", String(80), nullable=False, index=True),
    Column("data_digest", String(80), nullable=False),
    Column("created", String(32), nullable=False),
    Column("ended", String(32)),
    Column("error", Text),
    Column("result", JSON),
    Column("tenant", bytewise(64), nullable=False, server_default=DEFAULT),
    Column("owner", bytewise(200), nullable=False, server_default=""),
    Column("queued", String(32)),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("tries", Integer, nullable=False, server_default="0"),
    Column("due", Float, nullable=False, server_default="0"),
    Column("cancelled", String(32)),
    Column("who", String(100)),
    Column("recipe", Text),
    Column("spec", JSON),
    Column("beside", Boolean, nullable=False, server_default=false()),
    Index(None, "state", "kind"),
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
    *columns(JSON, "settings", "arms"),
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
    *columns(Integer, "answers", "errors", "slow"),
    Column("seconds", Float, nullable=False),
    *columns(Integer, "compared", "agreed"),
    Column("at", String(32), nullable=False),
)
panels = Table(
    "panels",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", bytewise(64), nullable=False, server_default=DEFAULT),
    Column("name", bytewise(100), nullable=False),
    Column("last_number", Integer, nullable=False),
    Column("production", Integer),
    Column("created", String(32), nullable=False),
    UniqueConstraint("tenant", "name"),
)
panel_versions = Table(
    "panel_versions",
    metadata,
    Column("panel_id", ForeignKey(panels.c.id), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("questions", JSON, nullable=False),
    Column("created", String(32), nullable=False),
    Column("who", String(100)),
)
panel_moves = Table(
    "panel_moves",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("panel_id", ForeignKey(panels.c.id), nullable=False, index=True),
    Column("verb", String(16), nullable=False),
    Column("number", Integer, nullable=False),
    Column("before", Integer),
    Column("moved", String(32), nullable=False),
    Column("who", String(100)),
)
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", bytewise(64), nullable=False, index=True),
    Column("adapter", bytewise(100)),
    Column("at", String(32), nullable=False),
    Column("who", String(100)),
    Column("verb", String(32), nullable=False),
    Column("what", String(200), nullable=False),
    *columns(JSON, "before", "after", nullable=True),
)
_REFUSED = "the audit log is append-only"
_KEEP_AUDIT = {  # dialect -> statements after those that make the tables
    "sqlite": (
        f"CREATE TRIGGER audit_keeps_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END",
        f"CREATE TRIGGER audit_keeps_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION turret_audit_keeps() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION '{_REFUSED}'; END $$",
        "CREATE TRIGGER audit_keeps BEFORE UPDATE OR DELETE OR TRUNCATE ON audit"
        " FOR EACH STATEMENT EXECUTE FUNCTION turret_audit_keeps()",
    ),
}
leases = Table(
    "leases",
    metadata,
    Column("name", bytewise(255), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("process", String(200), nullable=False),
    Column("host", String(255), nullable=False),
    Column("fence", Integer, nullable=False),
    Column("until", Float, nullable=False),
    Column("seconds", Float, nullable=False, server_default="30"),
)
job_turns = Table(
    "job_turns",
    metadata,
    Column("name", bytewise(300), primary_key=True),
    Column("turn", BigInteger, nullable=False),
)
queue_limits = Table(
    "queue_limits",
    metadata,
    Column("tenant", bytewise(64), primary_key=True, server_default=DEFAULT),
    *columns(Integer, "running", "waiting", nullable=True),
)
run_log = Table(
    "run_log",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run", ForeignKey(jobs.c.id), nullable=False, index=True),
    Column("tenant", bytewise(64), nullable=False, server_default=DEFAULT),
    Column("at", String(32), nullable=False),
    Column("line", String(500), nullable=False),
)
sessions = Table(
    "sessions",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("token", String(80), nullable=False),
    Column("ends", Float, nullable=False),
)
server_secrets = Table(
    "server_secrets",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", String(64), nullable=False),
)
client_files = Table(
    "client_files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", bytewise(200), nullable=False, index=True),
    Column("name", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("digest", String(80), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("upload", String(32), nullable=False),
    Column("created", Integer, nullable=False),
)
batches = Table(
    "batches",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", bytewise(200), nullable=False, index=True),
    Column("state", String(16), nullable=False, index=True),
    Column("endpoint", String(64), nullable=False),
    Column("input_file", String(40), nullable=False),
    *columns(String(40), "output_file", "error_file", nullable=True),
    Column("notes", JSON),
    Column("error", Text),
    Column("created", Integer, nullable=False),
    Column("times", JSON, nullable=False),
    *columns(Integer, "total", "done", "failed"),
    Column("taken", Integer, nullable=False, server_default="0"),
    Column("unanswered", JSON, nullable=False, server_default="{}"),
    Column("asking", JSON, nullable=False, server_default="[]"),
    Column("bytes", BigInteger, nullable=False, server_default="0"),
)
batch_parts = Table(
    "batch_parts",
    metadata,
    Column("batch", String(40), primary_key=True),
    Column("first", Integer, primary_key=True),
    *columns(Text, "answers", "errors"),
)
artifacts = Table(
    "artifacts",
    metadata,
    Column("path", bytewise(700), primary_key=True),
    Column("digest", String(80), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    *columns(String(32), "upload", "changed"),
)
usage = Table(
    "usage",
    metadata,
    Column("tenant", bytewise(64), primary_key=True),
    Column("adapter", bytewise(LONGEST_NAME), primary_key=True),
    Column("day", String(10), primary_key=True),
    *columns(BigInteger, "requests", "answers", "prompt_tokens", "completion_tokens"),
)
flushes = Table(
    "flushes",
    metadata,
    Column("writer", String(40), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("at", Float, nullable=False),
)
budgets = Table(
    "budgets",
    metadata,
    Column("name", bytewise(255), primary_key=True),
    Column("unit", String(16), primary_key=True),
    Column("per_minute", Integer, nullable=False),
    *columns(Float, "level", "at"),
)
promises = Table(
    "promises",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", bytewise(64), nullable=False),
    Column("digest", String(80), nullable=False),
    Column("metric", Text, nullable=False),
    *columns(Float, "error", "confidence", "threshold"),
    *columns(Integer, "examples", "counted", "wrong", "decided"),
    Column("source", Text, nullable=False),
    Column("split", String(100), nullable=False),
    Column("data_digest", String(80), nullable=False),
    Column("when_broken", String(16), nullable=False),
    *columns(Float, "outcome_ttl", "missing_bound"),
    Column("created", String(32), nullable=False),
    Column("who", String(100)),
    Column("broken", String(32)),
    Column("verdict", JSON),
    Column("sureness", JSON),  # of the examples that the threshold was chosen on
    Index(None, "tenant", "digest"),
)
promise_answers = Table(
    "promise_answers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("promise_id", ForeignKey(promises.c.id), nullable=False, index=True),
    Column("receipt", String(LONGEST_RECEIPT), nullable=False, unique=True),
    Column("label", Text, nullable=False),
    Column("probability", Float, nullable=False),
    Column("decided", Integer, nullable=False),
    Column("at", String(32), nullable=False),
)
promise_outcomes = Table(
    "promise_outcomes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("promise_id", ForeignKey(promises.c.id), nullable=False, index=True),
    Column("answer_id", ForeignKey(promise_answers.c.id), nullable=False, unique=True),
    Column("wrong", Integer, nullable=False),
    Column("right_label", Text),
    Column("at", String(32), nullable=False),
)
promise_watches = Table(
    "promise_watches",
    metadata,
    Column("promise_id", ForeignKey(promises.c.id), primary_key=True, autoincrement=False),
    *columns(Integer, "size", "examples", "round", "earlier"),
    Column("drifted", String(32)),
    Column("evidence", Float),
)
promise_inputs = Table(
    "promise_inputs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("promise_id", ForeignKey(promises.c.id), nullable=False, index=True),
    Column("round", Integer, nullable=False),
    Column("vector", LargeBinary, nullable=False),
    Column("at", String(32), nullable=False),
)
alarms = Table(
    "alarms",
    metadata,
    Column("audit_id", ForeignKey(audit.c.id), primary_key=True, autoincrement=False),
    Column("sent", String(32), nullable=False),
)


@dataclass(eq=False)
class Database:
    """One catalog, as one access sees it.

    `reading()` and `writing()` are the only ways to a connection, and each is a transaction.
    """

    _where: Path | Location
    _server: Sqlite | Postgres
    access: Access = OPERATOR

    @classmethod
    def open_catalog(cls, where: Path | Location, *, read_only: bool = False, alone: bool = False) -> Database:
        """Open the catalog. It is created or migrated if needed.

        Args:
            where: the SQLite file, or a location on PostgreSQL.
            alone: no other process may have the file open. Then it can be read on a full disk.
        """
        return cls(where, _server(where, read_only=read_only, alone=alone))._with_migrations()

    @classmethod
    def find_catalog(cls, where: Path | Location) -> Database | None:
        """Open the catalog if it exists; otherwise return None and create nothing."""
        with plain_errors(where):
            if isinstance(where, Path):
                if not where.exists():
                    return None
                return cls.open_catalog(
                    where, read_only=not (os.access(where.parent, os.W_OK) and os.access(where, os.W_OK))
                )
            server = _on_server(where)
            with server.transaction(writes=False) as connection:
                if _schema_of(connection) is None:
                    return None
        return cls(where, server)._with_migrations()

    @property
    def name(self) -> str:
        """The name of the catalog in reports of damage: "turret.db" or "catalog"."""
        return self._server.name

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection to one snapshot of the database."""
        with plain_errors(self._where), self._server.transaction(writes=False) as connection:
            yield connection.execution_options(**{ACCESS: self.access})

    def with_access(self, access: Access) -> Database:
        """The same database, whose connections see what this access sees."""
        return replace(self, access=access)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A connection that is the only writer. An exception rolls everything back."""
        self._require_writable()
        with plain_errors(self._where), self._server.transaction(writes=True) as connection:
            yield connection.execution_options(**{ACCESS: self.access})

    @contextmanager
    def adding(self) -> Iterator[Connection]:
        """A connection for sums that many processes add to at once. It is not the only writer.

        Each of its statements must be right whatever others commit meanwhile, and lock rows in the order of their keys.
        """
        self._require_writable()
        with plain_errors(self._where), self._server.adding() as connection:
            yield connection.execution_options(**{ACCESS: self.access})

    def _require_writable(self) -> None:
        if self._server.read_only:
            raise StoreError(
                f"store {self._server.store} is read-only here: give write permission, or use another --store"
            )

    def identity(self) -> str | None:
        """The id of this catalog, which no other catalog has.

        None for a folder store, whose files are next to the catalog, or if the id was lost.
        """
        with self.reading() as connection:
            return self._server.identity(connection)

    def writable(self) -> bool:
        """Whether this process may write."""
        with self.reading() as connection:
            return self._server.writable(connection)

    def damage(self, connection: Connection) -> Iterator[str]:
        """Problems that the database finds in itself."""
        return self._server.damage(connection)

    def _with_migrations(self) -> Database:
        with plain_errors(self._where):
            self._migrate()
        return self

    def _migrate(self) -> None:
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
        if found is not None and found < OLDEST:
            raise StoreError(
                f"store {store} has format {found}, this turret reads {OLDEST} to {SCHEMA}: export its adapters with "
                "the turret that wrote it (`turret export`), and import them here (`turret import`)"
            )
        if self._server.read_only:
            raise StoreError(
                f"store {store} has format {found}, this turret reads {SCHEMA}, and it is read-only here: "
                "run `turret list` once as a user who may write, which migrates it"
            )
        with self.writing() as connection:
            if _schema_of(connection) != SCHEMA:  # no other process migrated it while this one waited
                _migrate(connection)
                self._server.identify(connection)


def insert_row(connection: Connection, table: Table, row: Mapping[str, Plain | bytes]) -> int:
    """Insert a row and return its id."""
    key = connection.execute(insert(table).values(row)).inserted_primary_key
    assert key is not None
    return int(key[0])


def upsert(
    connection: Connection,
    table: Table,
    rows: Sequence[Mapping[str, Plain | bytes]],
    change: Literal["set", "add"] | None,
) -> None:
    """Insert rows that have the same columns.

    Args:
        change: what happens to the other columns of a row with the same primary key: they are set, or the new numbers
            are added to them. None: a row stays that has the same value where it must be unique.
    """
    if not rows:
        return
    new = (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(table)
    if change is None:
        connection.execute(new.on_conflict_do_nothing(), rows)
        return
    others, add = [each for each in table.c if not each.primary_key], change == "add"
    changed = {each.name: each + new.excluded[each.name] if add else new.excluded[each.name] for each in others}
    connection.execute(new.on_conflict_do_update(index_elements=list(table.primary_key), set_=changed), rows)


def _schema_of(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _migrate(connection: Connection) -> None:
    """Make the tables of a new catalog, or bring an older one up to date."""
    from alembic import command  # slow to import, and needed only for a new or an older store
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    if _schema_of(connection) is None:
        metadata.create_all(connection, checkfirst=False)  # another program's table of the same name is an error
        for statement in _KEEP_AUDIT[connection.dialect.name]:
            connection.exec_driver_sql(statement)
        command.stamp(config, "head")
    else:
        command.upgrade(config, "head")


@contextmanager
def plain_errors(where: Path | Location) -> Iterator[None]:
    """Turn errors of the disk and the database into a StoreError of one line that names the store."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        reason, server = str(getattr(error, "orig", None) or error), _server(where)
        outage = server.is_outage(reason)
        raise StoreError(f"store {server.store}: {server.describe_error(reason)}", outage=outage) from error
    except (json.JSONDecodeError, RecursionError) as error:
        server = _server(where)
        raise StoreError(
            f"store {server.store}: {server.name} has a row that is not JSON ({error}): restore it from a copy"
        ) from error
    except OSError as error:
        reason = describe_error(error, where if isinstance(where, Path) else where.local)
        raise StoreError(f"store {_server(where).store}: {reason}") from error


def _server(where: Path | Location, *, read_only: bool = False, alone: bool = False) -> Sqlite | Postgres:
    if isinstance(where, Path):
        return Sqlite(where, read_only=read_only, alone=alone)
    return _on_server(where)


def _on_server(where: Location) -> Postgres:
    assert where.catalog is not None
    return Postgres(where.catalog, where.shown)


# --- visibility -------------------------------------------------------------------------------------------------------
# The conditions that limit a query to what its connection's `Access` sees. With limited bases:
#
# - a row about a version is seen if the version is seen
# - a row about a name as a whole is seen if every version that the name ever had is seen
# - a job is seen if its version is seen, or if the base of its recipe may be used
#
# Every query that finds an adapter by name, or lists adapters, versions, experiments, answers or runs has one of them.
# A name of another tenant is therefore missed by the same query as a name that nobody has, in the same time.


KEPT = 1024  # accesses whose conditions are kept


def access_of(connection: Connection) -> Access:
    """The access of a connection. Raises KeyError for a connection that `Database` did not give out."""
    return connection.get_execution_options()[ACCESS]


def see_as(connection: Connection, access: Access) -> None:
    """Limit the rest of a transaction further, to one access of the same tenant."""
    if access.tenant != access_of(connection).tenant:
        raise ValueError(f"a transaction of tenant {access_of(connection).tenant} cannot become {access.tenant}'s")
    connection.execution_options(**{ACCESS: access})


def seen_adapters(connection: Connection) -> ColumnElement[bool]:
    """Rows of `adapters` that may be seen."""
    return _adapters(access_of(connection))


def seen_versions(connection: Connection) -> ColumnElement[bool]:
    """Rows of `versions` on a base that may be used. The query must also limit `adapters`."""
    return _versions(access_of(connection))


def seen_names(connection: Connection) -> Select[tuple[str]]:
    """The names whose rows as a whole may be seen, such as their usage.

    With limited bases a name with a version that was deleted is not among them: nothing tells the base of that.
    """
    access, names = access_of(connection), select(adapters.c.name).where(seen_adapters(connection))
    if "*" in access.bases:
        return names
    own = select(func.count()).where(versions.c.adapter_id == adapters.c.id, _versions(access))
    return names.where(own.correlate(adapters).scalar_subquery() == adapters.c.last_number)


# Building a condition takes longer than finding a row, and an access never changes.
@lru_cache(KEPT)
def _adapters(access: Access) -> ColumnElement[bool]:
    seen = and_(adapters.c.tenant == access.tenant, _like(adapters.c.name, access.adapters))
    if "*" not in access.bases:
        on_base = select(versions.c.id).where(versions.c.adapter_id == adapters.c.id, _versions(access))
        seen &= on_base.correlate(adapters).exists()
    return seen


@lru_cache(KEPT)
def _versions(access: Access) -> ColumnElement[bool]:
    return _like(versions.c.manifest[("base", "id")].as_string(), access.bases)


@lru_cache(KEPT)
def _arms(access: Access) -> ColumnElement[bool]:
    if "*" in access.bases:
        return true()
    is_arm = cast(experiments.c.arms, Text).contains('"' + versions.c.digest + '"')
    own = select(func.count()).where(versions.c.adapter_id == experiments.c.adapter_id, is_arm, _versions(access))
    return own.correlate(experiments).scalar_subquery() == func.json_array_length(experiments.c.arms)


def seen_experiments(connection: Connection) -> ColumnElement[bool]:
    """Rows of `experiments` that may be seen, for a query without `adapters`."""
    own = select(experiments.c.id).join(adapters, experiments.c.adapter_id == adapters.c.id)
    return experiments.c.id.in_(own.where(seen_adapters(connection), seen_arms(connection)))


def seen_arms(connection: Connection) -> ColumnElement[bool]:
    """Rows of `experiments` whose versions are all on bases that may be used. The query must also limit `adapters`.

    With limited bases an experiment of a version that was deleted is not seen: nothing tells its base.
    """
    return _arms(access_of(connection))


def seen_runs(connection: Connection, kind: str = TRAINING) -> ColumnElement[bool]:
    """Trainings that may be seen, by the name that they train, and with limited bases by their version or recipe.

    Args:
        kind: of jobs; studies are seen by the same rule.
    """
    access = access_of(connection)
    own = and_(jobs.c.kind == kind, jobs.c.tenant == access.tenant, _like(jobs.c.name, access.adapters))
    if "*" in access.bases:
        return own
    made = select(versions.c.run).join(adapters, versions.c.adapter_id == adapters.c.id)
    made = made.where(seen_adapters(connection), seen_versions(connection), versions.c.run.is_not(None))
    return own & or_(jobs.c.id.in_(made), *(_has_base(jobs.c.recipe, each) for each in access.bases))


def _has_base(recipe: ColumnElement[str], pattern: str) -> ColumnElement[bool]:
    """A recipe, as `Recipe.to_toml` writes it, has a base that matches the pattern, byte by byte."""
    line = f"\nbase = {json.dumps(pattern)}\n"
    return func.replace(recipe, line.replace('*"\n', ""), "") != recipe


def _like(column: ColumnElement[str], patterns: Iterable[str]) -> ColumnElement[bool]:
    """The column equals a pattern, or starts with one that ends in `*`, byte by byte."""
    if "*" in patterns:
        return true()
    starts = [each[:-1] for each in patterns if each.endswith("*")]
    names = [each for each in patterns if not each.endswith("*")]
    return or_(column.in_(names), *(func.substr(column, 1, len(each)) == each for each in starts))
