"""Removes what nothing refers to. Refuses to know what a version is for.

What goes, and why no process that is at work misses it:

- files that no version lists and no put is writing: no version ever lists them again (`turret.store.uploads` says why),
  so nobody waits for their removal, and it may arrive late
- leftovers in `tmp/` and run folders that were never listed: after an hour without a change; their writer is dead
- the checkpoint, and the bundle that was being proven, of a finished run: nothing goes on from it
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from turret.database import Database, runs
from turret.store import uploads
from turret.store.blobs import Blob, Files

OLD = 3600  # seconds
_RUN = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}", re.ASCII)


@dataclass(frozen=True)
class Removed:
    """One thing that is gone, or would be."""

    path: str  # under the place of the files; of a run, under its folder on this machine
    bytes: int
    why: str


@dataclass(frozen=True)
class Collected:
    """What a gc removed, or would."""

    dry_run: bool
    removed: tuple[Removed, ...]

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.removed)

    def as_json(self) -> dict[str, Any]:
        return {"dry_run": self.dry_run, "bytes": self.bytes, "removed": [asdict(each) for each in self.removed]}


def leftovers(files: Files, *, dry_run: bool) -> Iterator[Removed]:
    """Dead writers' files; asks no database, so that it makes room on a disk too full for one."""
    for name, size, changed in list(files.leftovers()):
        if _old(changed) and (dry_run or files.remove(name)):
            yield Removed(name, size, "leftover of a killed writer")


def unlisted(files: Files, database: Database, *, dry_run: bool) -> Iterator[Removed]:
    """Files that no version lists and no put is writing."""
    there = list(files.walk())  # before the catalog is asked: what is written after this is not looked at
    with database.reading() as connection:
        dead = uploads.dead(connection, there, without=uploads.abandoned(connection) if dry_run else ())
    yield from _gone(files, dead, dry_run)
    if not dry_run and uploads.forget_abandoned(database):  # last: on a full disk there may be room for it now
        with database.reading() as connection:
            late = [each for each in uploads.dead(connection, there) if each not in dead]
        yield from _gone(files, late, dry_run)


def _gone(files: Files, dead: Iterable[tuple[str, Blob]], dry_run: bool) -> Iterator[Removed]:
    for name, blob in dead:
        if dry_run or files.remove(name):
            yield Removed(name, blob.bytes, "no version lists it")


def of_runs(root: Path, database: Database, *, dry_run: bool) -> Iterator[Removed]:
    """What finished and unlisted runs left on this machine."""
    folders = [path for path in sorted((root / "runs").glob("*")) if _RUN.fullmatch(path.name) and path.is_dir()]
    with database.reading() as connection:
        states = {row.id: row.state for row in connection.execute(select(runs.c.id, runs.c.state))}
    for folder in folders:
        if states.get(folder.name) == "finished":
            for path in (folder / "checkpoint", *folder.glob("bundle-*")):
                if path.is_dir():
                    yield from _take(path, _size(path), "its run is finished", root, dry_run)
        elif folder.name not in states and _old(folder.stat().st_mtime):
            yield from _take(folder, _size(folder), "a run that never began", root, dry_run)


def _take(path: Path, size: int, why: str, root: Path, dry_run: bool) -> Iterable[Removed]:
    if not dry_run:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # another gc was quicker
            return []
    return [Removed(path.relative_to(root).as_posix(), size, why)]


def _old(changed: float) -> bool:
    return time.time() - changed > OLD


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_size if path.is_file() else 0
    return total
