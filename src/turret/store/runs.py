"""Trainings on disk: what a run leaves behind, and how an unfinished one is found again. Refuses to know training.

On disk, under the store's root, a folder a run:

- `runs/<id>/recipe.toml`: the filled recipe; written before the run is listed, so a listed run always has it
- `runs/<id>/curve.jsonl`, `runs/<id>/checkpoint/`: the trainer's own
- `runs/<id>/lock`: held by the process that runs it; the system lets go of it when that process dies, however it dies
- the id is the time of the start in UTC and six random hex digits, so ids sort by age
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import insert, select, update

from turret.database import Database, runs
from turret.disk import PRIVATE, flush, make_folder, permissions, sync
from turret.errors import StoreError
from turret.store.catalog import now, plain

if TYPE_CHECKING:
    from filelock import FileLock

State = Literal["interrupted", "failed", "finished"]


@dataclass(frozen=True)
class HeldRun:
    """A training that this process holds until it is ended."""

    id: str
    folder: Path
    resumed: bool  # it was begun by an earlier process
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
    """A new run, held by this process."""
    run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    own = folder / run_id
    if not folder.parent.exists():  # of a store by URL, this is the first thing on this machine
        make_folder(folder.parent, PRIVATE)
    make_folder(folder, permissions(folder.parent))
    make_folder(own, permissions(folder))
    with (own / "recipe.toml").open("xb") as file:
        file.write(recipe_toml.encode())
        flush(file)
    sync(own)
    lock = _hold(own)
    if lock is None:
        raise StoreError(f"run {run_id} is held by another process as it begins: try again")
    row = {
        "id": run_id,
        "name": name,
        "state": "running",
        "recipe_digest": digest_of(recipe_toml),
        "data_digest": data_digest,
        "created": now(),
    }
    with database.writing() as connection:
        connection.execute(insert(runs).values(row))
    return HeldRun(run_id, own, False, lock)


def take_up(database: Database, folder: Path, recipe_toml: str, data_digest: str) -> HeldRun | None:
    """The newest unfinished run of this recipe on this data that no living process holds; now this process holds it."""
    wanted = (
        (runs.c.recipe_digest == digest_of(recipe_toml))
        & (runs.c.data_digest == data_digest)
        & runs.c.state.in_(("running", "interrupted"))
    )
    with database.reading() as connection:
        candidates = connection.execute(select(runs.c.id).where(wanted).order_by(runs.c.id.desc())).scalars().all()
    for run_id in candidates:
        own = folder / run_id
        lock = _hold(own) if own.is_dir() else None
        if lock is None:
            continue
        with database.writing() as connection:
            again = update(runs).where(runs.c.id == run_id, wanted).values(state="running", ended=None, error=None)
            if connection.execute(again).rowcount == 1:  # not ended by another process before this one held the lock
                return HeldRun(run_id, own, True, lock)
        lock.release()
    return None


def finished(database: Database, recipe_toml: str, data_digest: str) -> dict[str, Any] | None:
    """What the newest finished run of this recipe on this data gave."""
    wanted = (runs.c.recipe_digest == digest_of(recipe_toml)) & (runs.c.data_digest == data_digest)
    asked = select(runs.c.result).where(wanted, runs.c.state == "finished").order_by(runs.c.id.desc())
    with database.reading() as connection:
        row = connection.execute(asked).first()
    return dict(row.result) if row is not None and row.result else None


def end(database: Database, run: HeldRun, state: State, *, error: str | None, result: Mapping[str, Any] | None) -> None:
    """Write down how the run ended, and let go of it."""
    if error is not None:  # a database takes neither half a character nor NUL
        error = error.encode("utf-8", "replace").decode().replace("\0", "?")
    row = {"state": state, "ended": now(), "error": error, "result": plain(result) if result is not None else None}
    try:
        with database.writing() as connection:
            connection.execute(update(runs).where(runs.c.id == run.id).values(row))
    finally:
        run._lock.release()


def find(database: Database, run_id: str) -> dict[str, Any] | None:
    """What is known of the run, or None."""
    with database.reading() as connection:
        row = connection.execute(select(runs).where(runs.c.id == run_id)).first()
    return dict(row._mapping) if row is not None else None


def listed(database: Database, most: int) -> list[dict[str, Any]]:
    """What is known of the newest runs, the newest first."""
    with database.reading() as connection:
        rows = connection.execute(select(runs).order_by(runs.c.id.desc()).limit(most)).all()
    return [dict(row._mapping) for row in rows]


def digest_of(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _hold(folder: Path) -> FileLock | None:
    from filelock import FileLock, Timeout  # only a training needs it

    lock = FileLock(folder / "lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock
