"""Removes what nothing refers to. Refuses to know what a version is for.

What goes, and why no process that is at work misses it:

- files that no version lists: each is removed while this process is the only writer of the database, after a look
  whether it is listed. A put looks, as the only writer, whether its files are still there before it lists them, and
  writes again what is not; so a file is either listed and kept, or gone and written again
  (a catalog on a server is asked before each removal whether that still holds: the connection may have been lost)
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
from turret.database import files as listing
from turret.store.blobs import Files

OLD = 3600  # seconds
_AT_ONCE = 100  # files a transaction: other writers wait for it, and an object store takes its time
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
    """Files that no version lists."""
    door = database.reading if dry_run else database.writing
    there = list(files.walk())
    for start in range(0, len(there), _AT_ONCE):
        some = there[start : start + _AT_ONCE]
        digests = [blob.digest for _, blob in some]
        taken: list[Removed] = []
        with door() as connection:
            rows = connection.execute(select(listing.c.digest).where(listing.c.digest.in_(digests)).distinct())
            listed = set(rows.scalars())
            for name, blob in some:
                if blob.digest not in listed:
                    connection.execute(select(1))  # raises where this is the only writer no more
                    if dry_run or files.remove(name):
                        taken.append(Removed(name, blob.bytes, "no version lists it"))
        yield from taken


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
