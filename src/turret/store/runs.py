"""Training runs: a folder and a row for each, and how an unfinished one is found again.

A folder per run, under the store's root on this machine:

- `runs/<id>/recipe.toml`: the recipe with all defaults; written before the run is listed, so every listed run has it
- `runs/<id>/curve.jsonl`, `runs/<id>/checkpoint/`: written by the trainer
- `runs/<id>/lock`: locked by the process of the run; the system unlocks it when that process ends, even by a kill
- the id is the start time in UTC and six random hex digits, so ids sort by age
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy import ColumnElement, insert, select, update

from turret.database import Database, runs
from turret.disk import PRIVATE, flush, make_folder, permissions, sync
from turret.errors import StoreError
from turret.json_types import JsonMapping, JsonObject
from turret.store.blobs import digest_of
from turret.store.catalog import now, plain
from turret.visibility import access_of, seen_runs

if TYPE_CHECKING:
    from filelock import FileLock

State = Literal["interrupted", "failed", "finished"]


@dataclass(frozen=True)
class HeldRun:
    """A training run that this process holds until it is ended."""

    id: str
    folder: Path
    resumed: bool  # an earlier process started it
    _lock: FileLock

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"

    @property
    def curve(self) -> Path:
        return self.folder / "curve.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"


def begin(database: Database, folder: Path, name: str, recipe_toml: str, data_digest: str) -> HeldRun:
    """Start a run, which this process then holds."""
    run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    own = folder / run_id
    if not folder.parent.exists():  # with a store by URL, the first run creates its folder
        make_folder(folder.parent, PRIVATE)
    make_folder(folder, permissions(folder.parent))
    make_folder(own, permissions(folder))
    with (own / "recipe.toml").open("xb") as file:
        file.write(recipe_toml.encode())
        flush(file)
    sync(own)
    lock = _hold(own)
    if lock is None:
        raise StoreError(f"run {run_id} is locked by another process: try again")
    row = {
        "id": run_id,
        "name": name,
        "state": "running",
        "recipe_digest": digest_of(recipe_toml),
        "data_digest": data_digest,
        "created": now(),
    }
    with database.writing() as connection:
        connection.execute(insert(runs).values(tenant=access_of(connection).tenant, **row))
    return HeldRun(run_id, own, False, lock)


def take_up(database: Database, folder: Path, recipe_toml: str, data_digest: str) -> HeldRun | None:
    """The newest unfinished run of this recipe and data that no living process holds; this process then holds it."""
    unfinished = _same(recipe_toml, data_digest) & runs.c.state.in_(("running", "interrupted"))
    with database.reading() as connection:
        mine = select(runs.c.id).where(unfinished, seen_runs(connection))
        candidates = connection.execute(mine.order_by(runs.c.id.desc())).scalars().all()
    for run_id in candidates:
        own = folder / run_id
        lock = _hold(own) if own.is_dir() else None
        if lock is None:
            continue
        with database.writing() as connection:
            resume = update(runs).where(runs.c.id == run_id, unfinished).values(state="running", ended=None, error=None)
            if connection.execute(resume).rowcount == 1:  # no other process ended it before this one had the lock
                return HeldRun(run_id, own, True, lock)
        lock.release()
    return None


def finished(database: Database, recipe_toml: str, data_digest: str) -> JsonObject | None:
    """The result of the newest finished run of this recipe and data; None if there is none."""
    query = select(runs.c.result).where(_same(recipe_toml, data_digest), runs.c.state == "finished")
    with database.reading() as connection:
        row = connection.execute(query.where(seen_runs(connection)).order_by(runs.c.id.desc())).first()
    return dict(row.result) if row is not None and row.result else None


def end(database: Database, run: HeldRun, state: State, *, error: str | None, result: JsonMapping | None) -> None:
    """Record how the run ended, and release it."""
    if error is not None:  # PostgreSQL stores neither a lone surrogate nor NUL
        error = error.encode("utf-8", "replace").decode().replace("\0", "?")
    row = {"state": state, "ended": now(), "error": error, "result": plain(result) if result is not None else None}
    try:
        with database.writing() as connection:
            connection.execute(update(runs).where(runs.c.id == run.id).values(row))
    finally:
        run._lock.release()


def find(database: Database, run_id: str) -> JsonObject | None:
    """One run as a row of the table; None if there is none."""
    with database.reading() as connection:
        row = connection.execute(select(runs).where(runs.c.id == run_id, seen_runs(connection))).first()
    return dict(row._mapping) if row is not None else None


def listed(database: Database, most: int) -> list[JsonObject]:
    """The newest runs, newest first."""
    with database.reading() as connection:
        newest = select(runs).where(seen_runs(connection)).order_by(runs.c.id.desc()).limit(most)
        rows = connection.execute(newest).all()
    return [dict(row._mapping) for row in rows]


def _same(recipe_toml: str, data_digest: str) -> ColumnElement[bool]:
    """Runs of this recipe on this data."""
    return (runs.c.recipe_digest == digest_of(recipe_toml)) & (runs.c.data_digest == data_digest)


def _hold(folder: Path) -> FileLock | None:
    from filelock import FileLock, Timeout  # only a training needs it

    lock = FileLock(folder / "lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock
