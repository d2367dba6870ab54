"""Remove files that nothing refers to.

What a gc removes, and why no running process needs it:

- files that no version lists and no put is writing: no version will list them (`turret.store.uploads`), so it does not
  matter when the removal arrives
- leftovers in `tmp/`, and folders of runs that were never listed, after an hour without a change by the clock of their
  disk: their writer is dead
- the checkpoint of a finished run and the bundle that it proved: nothing resumes from them
- the data of queued trainings that have ended (`turret.store.queued_data`)
- the embeddings of promises that are not in force (`turret.store.promises`)
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import select

from turret.database import Database, jobs
from turret.disk import bytes_below, clock_of
from turret.errors import StoreError
from turret.json_types import JsonObject
from turret.store import promises, uploads
from turret.store.blobs import Blob, Files
from turret.store.scratch import OLD, Removed

_RUN = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}", re.ASCII)


@dataclass(frozen=True)
class Collected:
    """Everything that a gc removed, or would remove."""

    dry_run: bool
    removed: tuple[Removed, ...]

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.removed)

    def as_json(self) -> JsonObject:
        return {"dry_run": self.dry_run, "bytes": self.bytes, "removed": [asdict(each) for each in self.removed]}


def leftovers(files: Files, *, dry_run: bool) -> Iterator[Removed]:
    """Remove files of dead writers. Needs no database, so it can free space on a disk too full for one."""
    found = list(files.leftovers())
    now = files.clock() if found else 0.0
    for name, size, changed in found:
        if now - changed > OLD and (dry_run or files.remove(name)):
            yield Removed(name, size, "leftover of a killed writer")


def unlisted(files: Files, database: Database, *, dry_run: bool) -> Iterator[Removed]:
    """Remove files that no version lists and no put is writing."""
    existing = list(files.walk())  # before the catalog is read: files written later are ignored
    with database.reading() as connection:
        dead = uploads.dead(connection, existing, without=uploads.abandoned(connection) if dry_run else ())
    yield from _remove(files, dead, dry_run)
    if not dry_run and uploads.forget_abandoned(database):  # last: a full disk may have room for this write now
        with database.reading() as connection:
            late = [each for each in uploads.dead(connection, existing) if each not in dead]
        yield from _remove(files, late, dry_run)


def _remove(files: Files, dead: Iterable[tuple[str, Blob]], dry_run: bool) -> Iterator[Removed]:
    for name, blob in dead:
        if dry_run or files.remove(name):
            yield Removed(name, blob.bytes, "no version lists it")


def of_runs(root: Path, database: Database, *, dry_run: bool) -> Iterator[Removed]:
    """Remove what finished and unlisted runs left on this machine."""
    folders = [path for path in sorted((root / "runs").glob("*")) if _RUN.fullmatch(path.name) and path.is_dir()]
    with database.reading() as connection:
        states = {row.id: row.state for row in connection.execute(select(jobs.c.id, jobs.c.state))}
    for folder in folders:
        if states.get(folder.name) == "finished":
            for path in (folder / "checkpoint", *folder.glob("bundle-*")):
                if path.is_dir():
                    yield from _remove_folder(path, bytes_below(path), "its run is finished", root, dry_run)
        elif folder.name not in states and clock_of(folder.parent) - folder.stat().st_mtime > OLD:
            yield from _remove_folder(folder, bytes_below(folder), "a run that never started", root, dry_run)


def of_promises(database: Database, *, dry_run: bool) -> Iterator[Removed]:
    """Remove the embeddings of promises that are not in force: a newer one is, or no version is left."""
    with database.reading() as connection:
        found = promises.forget_inputs(connection, dry_run=True)
    if found and not dry_run:
        try:
            with database.writing() as connection:
                found = promises.forget_inputs(connection, dry_run=False)
        except StoreError:  # the disk is full: the files are gone already, and the next gc has room for this write
            found = []
    yield from (Removed(f"promises/{each}/inputs", size, "its promise is not in force") for each, size in found)


def _remove_folder(path: Path, size: int, why: str, root: Path, dry_run: bool) -> Iterable[Removed]:
    if not dry_run:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # another gc removed it
            return []
    return [Removed(path.relative_to(root).as_posix(), size, why)]
