"""Training runs: a folder and a row for each, and how an unfinished one is found again.

A folder per run, under the store's root on this machine. A store by URL has copies of it (`turret.store.artifacts`):

- `runs/<id>/recipe.toml`: the recipe with all defaults; written before the run is listed, so every listed run has it
- `runs/<id>/curve.jsonl`, `runs/<id>/checkpoint/`: written by the trainer
- `runs/<id>/fence`: the fence of the last lease under which the files of this folder were written
- the id is the start time in UTC and six random hex digits, so ids sort by age

The process of a run holds the lease `jobs/<id>` (`turret.store.leases`). A run whose lease has ended is taken up by the
same command on any machine, and until then it is listed as interrupted. A run ends once: every write of its process
asks lease and state (`HeldRun.require`), and its version is listed in the transaction that makes it `finished`.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypedDict

from sqlalchemy import ColumnElement, Connection, Select, delete, insert, select, update

from turret import audit
from turret.database import TRAINING, Database, access_of, jobs, run_log, seen_runs
from turret.database import leases as lease_rows
from turret.disk import make_below, make_folder, replace_text
from turret.errors import InUse, LeaseLost, StoreError
from turret.json_types import JsonObject, JsonValue, Plain
from turret.postgres import plain_text
from turret.store import leases
from turret.store.artifacts import Artifacts
from turret.store.blobs import Blob, digest_of
from turret.store.catalog import now, plain, who
from turret.store.leases import Lease, LeaseRenewer
from turret.store.scratch import disk_errors

State = Literal["interrupted", "failed", "finished"]
ENDED = ("finished", "failed", "cancelled")  # states after which nothing about a run changes
PREFIX = "runs/"  # of the files of runs
HELD = "jobs/"  # of the leases of jobs
CHECKPOINT = "checkpoint.safetensors"
CURVE_SECONDS = 10.0  # between copies of the curve of a running training to the store
OF_QUEUE = ("priority", "tries", "queued", "who")  # what a run from the queue shows as its `queue`
OF_RUN = ("id", "name", "state", "recipe_digest", "data_digest", "created", "ended", "error", "result", "tenant")
SHOWN = [jobs.c[name] for name in (*OF_RUN, *OF_QUEUE)]
NEXT = "its worker ended without a word: another one goes on from the last checkpoint"
LOST = "its process ended without a word, or lost the store: the same command goes on from the last checkpoint"


class QueueRow(TypedDict):
    """A run in the queue."""

    priority: int
    tries: int
    queued: str
    who: str | None


class RunRow(TypedDict):
    """A run as the catalog lists it."""

    id: str
    name: str
    state: str
    recipe_digest: str
    data_digest: str
    created: str
    ended: str | None
    error: str | None
    result: JsonObject | None  # of `turret.workspace.results.RunResult`, or the kind of the error
    tenant: str
    queue: QueueRow | None


@dataclass(frozen=True)
class HeldRun:
    """A training run that this process holds until it is ended."""

    id: str
    folder: Path
    lease: Lease
    comparison: str | None = None  # the folder of the comparison that trains, whose version it will be

    def require(self, connection: Connection) -> None:
        """Raise LeaseLost unless this process still has the run and the run has not ended, in a write that needs it."""
        self.lease.require(connection)
        state = connection.execute(select(jobs.c.state).where(jobs.c.id == self.id)).scalar()
        if state != "running":
            raise LeaseLost(f"run {self.id} is {state}: nothing that this process does after that is kept")

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"

    @property
    def curve(self) -> Path:
        return self.folder / "curve.jsonl"

    @property
    def report(self) -> Path:
        return self.folder / "report.json"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"


class TrainingRuns:
    """The runs of one store.

    Args:
        root: the store's folder on this machine.
    """

    def __init__(self, database: Database, root: Path, artifacts: Artifacts) -> None:
        self._database, self._root, self._artifacts = database, root, artifacts

    def begin(self, name: str, recipe_toml: str, data_digest: str) -> HeldRun:
        """Start a run, which this process then holds."""
        run_id = new_id()
        own = self._make_folder(run_id)
        replace_text(own / "recipe.toml", recipe_toml)
        row = {"id": run_id, "name": name, "state": "running", "created": now(), "recipe": recipe_toml}
        row |= {"recipe_digest": digest_of(recipe_toml), "data_digest": data_digest}
        with self._database.writing() as connection:
            lease = leases.take(connection, HELD + run_id)
            if lease is None:
                raise StoreError(f"run {run_id} is held by another process: try again")
            connection.execute(insert(jobs).values(tenant=access_of(connection).tenant, **row))
        replace_text(own / "fence", str(lease.fence))
        return HeldRun(run_id, own, lease)

    def hold(self, run_id: str, recipe_toml: str, lease: Lease) -> HeldRun:
        """Hold a run whose lease was taken from the queue, with the newest of its files."""
        run = HeldRun(run_id, self._root / PREFIX / run_id, lease)
        with disk_errors(f"run {run_id} cannot be copied", run.folder, "make room"):
            self._bring(run, recipe_toml)
        return run

    def fill(self, run: HeldRun, recipe_toml: str, data_digest: str) -> None:
        """Record the recipe with all defaults, and the data, of a run from the queue. Raises LeaseLost."""
        replace_text(run.recipe, recipe_toml)
        row = {"recipe_digest": digest_of(recipe_toml), "data_digest": data_digest}
        with self._database.writing() as connection:
            run.require(connection)
            connection.execute(update(jobs).where(jobs.c.id == run.id).values(row))

    def write_report(self, run: HeldRun, text: str) -> None:
        """Keep what the run's version gets right and wrong, beside its curve."""
        replace_text(run.report, text)

    def take_up(self, recipe_toml: str, data_digest: str, say: Callable[[str], None]) -> HeldRun | None:
        """The newest unfinished run of this recipe and data that no living process holds; this process then holds it.

        Args:
            say: called with a line before this process waits for the end of a lease.
        """
        unfinished = _same(recipe_toml, data_digest) & jobs.c.state.in_(("running", "interrupted"))
        with self._database.reading() as connection:
            query = select(jobs.c.id).where(unfinished, seen_runs(connection)).order_by(jobs.c.id.desc())
            candidates = connection.execute(query).scalars().all()
        for run_id in candidates:
            if not self._is_here(run_id) or not leases.is_free(self._database, HELD + run_id, say):
                continue
            with self._database.writing() as connection:
                lease = leases.take(connection, HELD + run_id)
                if lease is None:
                    continue
                chosen = (jobs.c.id == run_id) & unfinished
                resume = update(jobs).where(chosen).values(state="running", ended=None, error=None)
                if connection.execute(resume).rowcount != 1:  # another process ended it in the meantime
                    leases.release(connection, lease)
                    continue
            run = HeldRun(run_id, self._root / PREFIX / run_id, lease)
            try:
                self._bring(run, recipe_toml)
            except BaseException as error:
                with suppress(StoreError):  # otherwise its lease ends by itself
                    self.end(run, "interrupted", error=str(error), result=None)
                raise
            return run
        return None

    def keeper(self, run: HeldRun, warn: Callable[[str], None]) -> LeaseRenewer:
        """Renews the lease of the run, and copies its curve and checkpoints to the store, while a `with` block runs."""
        copied: dict[Path, tuple[int, int]] = {}
        last = time.monotonic()

        def turn(over: bool) -> None:
            nonlocal last
            checkpoint, due = run.checkpoint / CHECKPOINT, over or time.monotonic() - last > CURVE_SECONDS
            if not due and (not checkpoint.exists() or _state(checkpoint) == copied.get(checkpoint)):
                return
            states = {path: _state(path) for path in (run.recipe, checkpoint, run.curve, run.report)}
            changed = [path for path, state in states.items() if state != copied.get(path) and path.exists()]
            if changed:
                self._copy(run, changed)
                copied.update(states)
            last = time.monotonic()

        return LeaseRenewer(self._database, run.lease, turn=turn if self._artifacts.copies else None, warn=warn)

    def _copy(self, run: HeldRun, paths: Sequence[Path]) -> None:
        """Copy files of the run as they are now; the trainer may replace them in the meantime.

        The checkpoint is taken before the curve, so the curve has every step of the checkpoint.
        """
        working = run.folder / "copied"
        shutil.rmtree(working, ignore_errors=True)
        try:
            with disk_errors(f"run {run.id} cannot be copied", working, "make room"):
                make_folder(working)
                sources = {}
                for path in paths:
                    if path.name == CHECKPOINT:  # it is replaced as a whole, and may be large
                        _link(path, working / path.name)
                    else:
                        shutil.copyfile(path, working / path.name)
                    sources[path.relative_to(self._root).as_posix()] = working / path.name
                self._artifacts.keep_as(sources, run)
        finally:
            shutil.rmtree(working, ignore_errors=True)

    def finished_result(self, recipe_toml: str, data_digest: str) -> JsonObject | None:
        """The result of the newest finished run of this recipe and data; None if there is none."""
        query = select(jobs.c.result).where(_same(recipe_toml, data_digest), jobs.c.state == "finished")
        with self._database.reading() as connection:
            row = connection.execute(query.where(seen_runs(connection)).order_by(jobs.c.id.desc())).first()
        return None if row is None else row.result or None

    def end(self, run: HeldRun, state: State, *, error: str | None, result: Mapping[str, Plain] | None) -> None:
        """Record how the run ended, and release it. Raises LeaseLost if it had ended, or another process has it."""
        try:
            with self._database.writing() as connection:
                dead = self.end_in(connection, run, state, error=error, result=result)
        except BaseException:  # a full disk, an outage
            leases.give_up(run.lease)
            raise
        self._artifacts.discard(dead)

    def end_in(
        self,
        connection: Connection,
        run: HeldRun,
        state: State,
        *,
        error: str | None,
        result: Mapping[str, Plain] | None,
    ) -> list[Blob]:
        """As `end`, in a transaction. Returns the files that are not needed after it, for `Artifacts.discard`."""
        run.require(connection)
        error = None if error is None else plain_text(error)
        row = {"state": state, "ended": now(), "error": error, "result": plain(result)}
        connection.execute(update(jobs).where(jobs.c.id == run.id).values(row))
        if state == "interrupted":  # another process may go on
            leases.release(connection, run.lease)
        else:
            leases.close(connection, run.lease.name, run.lease)
        # Nothing resumes from the checkpoint of a finished run.
        return self._artifacts.drop(connection, f"{PREFIX}{run.id}/checkpoint/") if state == "finished" else []

    def start_over(self, run: HeldRun) -> None:
        """Remove the checkpoint and the curve of a run that cannot resume from them here. Raises LeaseLost."""
        with self._database.writing() as connection:
            run.require(connection)
            dead = self._artifacts.drop(connection, f"{PREFIX}{run.id}/checkpoint/")
            dead += self._artifacts.drop(connection, f"{PREFIX}{run.id}/curve.jsonl")
        self._artifacts.discard(dead)
        shutil.rmtree(run.checkpoint, ignore_errors=True)
        run.curve.unlink(missing_ok=True)

    def delete(self, run_id: str) -> None:
        """Remove a run that has ended, with its files and its log. Raises InUse if it waits or runs."""
        with self._database.writing() as connection:
            this = (jobs.c.id == run_id) & seen_runs(connection)
            name, state = connection.execute(select(jobs.c.name, jobs.c.state).where(this)).one()
            if state == "waiting" or run_id in leases.held_leases(connection, HELD):
                raise InUse(
                    f"run {run_id} is not deleted, because it {'waits' if state == 'waiting' else 'runs'}: "
                    f"`turret runs cancel {run_id}` ends one of the queue"
                )
            connection.execute(delete(run_log).where(run_log.c.run == run_id))
            connection.execute(delete(jobs).where(this))
            leases.close(connection, HELD + run_id)
            audit.record(connection, "delete", f"run {run_id}", name, before={"state": state}, at=now(), who=who())
            dead = self._artifacts.drop(connection, f"{PREFIX}{run_id}/")
        self._artifacts.discard(dead)
        shutil.rmtree(self._root / PREFIX / run_id, ignore_errors=True)

    def file(self, run_id: str, name: str) -> bytes | None:
        """A file of a run: of this machine if it wrote it last, else the store's copy. None if there is none."""
        local = self._root / PREFIX / run_id / name
        if self._artifacts.copies and not self._is_newest(run_id):
            copy = self._artifacts.read(f"{PREFIX}{run_id}/{name}")
            if copy is not None:
                return copy
        try:
            return local.read_bytes()
        except OSError:
            return None

    def recipe(self, run_id: str) -> str | None:
        """The recipe of a run, as its process wrote it, or as it was submitted. None if it is lost."""
        content = self.file(run_id, "recipe.toml")
        if content is not None:
            return content.decode("utf-8", "replace")
        with self._database.reading() as connection:
            return connection.execute(select(jobs.c.recipe).where(jobs.c.id == run_id)).scalar()

    # --- private ------------------------------------------------------------------------------------------------------

    def _is_here(self, run_id: str) -> bool:
        """Whether this machine can go on with the run: its files are here, or in the store."""
        return self._artifacts.copies or (self._root / PREFIX / run_id).is_dir()

    def _is_newest(self, run_id: str) -> bool:
        query = select(lease_rows.c.fence, jobs.c.state).join(jobs, lease_rows.c.name == HELD + jobs.c.id)
        with self._database.reading() as connection:
            row = connection.execute(query.where(jobs.c.id == run_id)).first()
        last = None if row is None else row.fence - (row.state in ENDED)  # its end has raised the fence
        return last == _fence(self._root / PREFIX / run_id)

    def _bring(self, run: HeldRun, recipe_toml: str) -> None:
        """Make the folder of the run on this machine have the newest of its files."""
        own = self._make_folder(run.id)
        if self._artifacts.copies and _fence(own) != run.lease.fence - 1:  # another machine went on since
            for path in (run.checkpoint, own / "copied"):
                shutil.rmtree(path, ignore_errors=True)
            run.curve.unlink(missing_ok=True)
            self._artifacts.bring(f"{PREFIX}{run.id}/")
        if not run.recipe.exists():
            replace_text(run.recipe, recipe_toml)
        replace_text(own / "fence", str(run.lease.fence))

    def _make_folder(self, run_id: str) -> Path:
        folder = self._root / PREFIX / run_id
        make_below(self._root, folder)  # with a store by URL, the first run creates its root
        return folder


def _link(path: Path, name: Path) -> None:
    """Give a file a second name; on disks that have none, copy it."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def new_id() -> str:
    """The id of a run that is made now."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


def find(database: Database, run_id: str) -> RunRow | None:
    """One run as a row of the table; None if there is none."""
    with database.reading() as connection:
        found = _read_runs(connection, select(*SHOWN).where(jobs.c.id == run_id, seen_runs(connection)))
    return found[0] if found else None


def list_runs(database: Database, most: int) -> list[RunRow]:
    """The newest runs, newest first."""
    with database.reading() as connection:
        newest = select(*SHOWN).where(seen_runs(connection)).order_by(jobs.c.id.desc()).limit(most)
        return _read_runs(connection, newest)


def _read_runs(connection: Connection, query: Select[tuple[Plain, ...]]) -> list[RunRow]:
    """The rows, with `queue` for a run from the queue. A run without a living process is not shown as running."""
    rows: list[JsonValue] = [dict(row) for row in connection.execute(query).mappings()]
    runs = any(row["state"] == "running" for row in rows)
    living = leases.held_leases(connection, HELD, late=True) if runs else set()
    for row in rows:
        queue = {name: row.pop(name) for name in OF_QUEUE}
        row["queue"] = None if queue["queued"] is None else queue
        if row["state"] == "running" and row["id"] not in living:
            row["state"], row["error"] = ("waiting", NEXT) if row["queue"] else ("interrupted", LOST)
    return rows


def _same(recipe_toml: str, data_digest: str) -> ColumnElement[bool]:
    """Runs of this recipe on this data."""
    same_data = (jobs.c.kind == TRAINING) & (jobs.c.data_digest == data_digest)
    return same_data & (jobs.c.recipe_digest == digest_of(recipe_toml))


def _fence(folder: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int((folder / "fence").read_text(encoding="ascii"))
    return None


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written or replaced."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns
