"""The data that trainings need: files in `queued/<32 hex digits>/`, which the recipe of a run names, and kept rows.

Those of a tenant are in `tenants/<tenant>/queued/`; the tenant `default` has the folder at the top. The digits are a
hash of the content, so trainings of the same data share one copy. In a folder store the files are there; a store by URL
has them as artifacts, and a worker brings them into a folder of the same name.

`submit` adds a run in the transaction that makes sure of its data. `collect` looks for waiting and running trainings,
and gives the rest up, in one transaction too. Writing transactions are serialized, and a worker takes a run before it
looks for the data. So no gc removes what such a training needs.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

from sqlalchemy import Connection, Text, cast, select

from turret.access import DEFAULT
from turret.data import memory
from turret.database import OPEN_STATES, Database, access_of, jobs, versions
from turret.disk import PRIVATE, bytes_below, make_folder, permissions, place_folder, sync
from turret.store import scratch
from turret.store.artifacts import Artifact, Artifacts
from turret.store.scratch import OLD, Removed
from turret.timestamp import timestamp

FOLDER = "queued"
PLACE = re.compile("[0-9a-f]{32}(?=/)")  # of data, in a recipe
GONE = "gone-"  # begins the name of a folder that a gc has given up, and removes
WHY = "no waiting or running training needs it"
_NAME = re.compile("[0-9a-f]{32}")
_STORED = re.compile(f"(?:tenants/([^/]+)/)?{FOLDER}/([0-9a-f]{{32}})/.*")  # a path in the store


def folder_of(tenant: str) -> str:
    """The folder of a tenant's data, under the root of the store."""
    return FOLDER if tenant == DEFAULT else f"tenants/{tenant}/{FOLDER}"


def submit(
    root: Path, database: Database, artifacts: Artifacts, files: Mapping[str, Path], add: Callable[[Connection], str]
) -> str:
    """Add a run and its data. Returns its id.

    Args:
        database: as the tenant whose run it is sees it.
        files: path under the tenant's `queued/` -> a local file with the content.
        add: adds the run, in a writing transaction, and returns its id.
    """
    folder = folder_of(database.access.tenant)
    if artifacts.copies and files:
        added: list[str] = []
        sources = {f"{folder}/{name}": path for name, path in files.items()}
        artifacts.keep_as(sources, also=lambda connection: added.append(add(connection)))
        return added[-1]
    with scratch.folder(root) if files else nullcontext(root) as working:
        for name, path in files.items():
            make_folder((working / name).parent)
            shutil.copyfile(path, working / name)
            sync(working / name)
        with database.writing() as connection:
            for name in files:  # a folder store has its files on the disk of its catalog
                _move(working / name, root / folder / name)
            return add(connection)


def is_there(connection: Connection, root: Path, artifacts: Artifacts, source: str) -> bool:
    """Whether no gc has given up the data of a run. In a writing transaction of its tenant.

    Args:
        source: of its recipe.
    """
    if PLACE.match(source) is None:
        return True
    path = f"{folder_of(access_of(connection).tenant)}/{source}"
    if artifacts.copies:
        paths = [each.path for each in artifacts.list_files_in(connection, path)]
        return any(each == path or each.startswith(f"{path}/") for each in paths)
    return (root / path).exists()


def collect(root: Path, database: Database, artifacts: Artifacts, *, dry_run: bool) -> Iterator[Removed]:
    """Remove the data that no waiting or running training names, and after an hour the rows that nothing names.

    From the store and from this machine.
    """
    for name, unneeded, why in ((FOLDER, _unneeded_data, WHY), (ROWS_FOLDER, _unneeded_rows, ROWS_WHY)):
        with database.reading() as connection:
            local, listed = unneeded(connection, root, artifacts)
        if (local or listed) and not dry_run:  # without anything to remove a disk without room is no obstacle
            with database.writing() as connection:
                local, listed = unneeded(connection, root, artifacts)
                dead = [blob for each in listed for blob in artifacts.drop(connection, each.path)]
                for path in local:
                    path.rename(path.with_name(f"{GONE}{uuid.uuid4().hex[:8]}-{path.name}"))
            artifacts.discard(dead)
        yield from (Removed(each.path, each.blob.bytes, why) for each in listed)
        gone = [path for _, folder in _folders(root, name) for path in sorted(folder.glob(f"{GONE}*"))]
        for path in [*(local if dry_run else ()), *gone]:
            size = bytes_below(path)
            if not dry_run:
                shutil.rmtree(path, ignore_errors=True)
            yield Removed((path.parent.relative_to(root) / path.name.rpartition("-")[2]).as_posix(), size, why)


def _folders(root: Path, name: str) -> list[tuple[str, Path]]:
    """Tenant and folder of all data, or of all rows, on this machine."""
    others = [(path.parent.name, path) for path in sorted(root.glob(f"tenants/*/{name}"))]
    return [(DEFAULT, root / name), *others]


def _unneeded_data(connection: Connection, root: Path, artifacts: Artifacts) -> tuple[list[Path], list[Artifact]]:
    """The folders of this machine, and the files of the store, whose data no waiting or running training names."""
    open_ = jobs.c.queued.is_not(None) & jobs.c.state.in_(OPEN_STATES)
    rows = connection.execute(select(jobs.c.tenant, jobs.c.recipe, jobs.c.spec).where(open_)).all()
    texts = [(row.tenant, text) for row in rows for text in (row.recipe, (row.spec or {}).get("source")) if text]
    needed = {(tenant, place) for tenant, text in texts for place in PLACE.findall(text)}
    local = [
        path
        for tenant, folder in _folders(root, FOLDER)
        for path in sorted(folder.glob("*"))
        if _NAME.fullmatch(path.name) and (tenant, path.name) not in needed
    ]
    stored = [
        (each, match)
        for top in (FOLDER, "tenants")
        for each in artifacts.list_files_in(connection, f"{top}/")
        if (match := _STORED.fullmatch(each.path))
    ]
    return local, [each for each, match in stored if (match[1] or DEFAULT, match[2]) not in needed]


def _move(new: Path, target: Path) -> None:
    if not target.exists():
        make_folder(target.parent)
        os.replace(new, target)
        sync(target.parent)


# --- rows that were in memory -----------------------------------------------------------------------------------------
# Rows that were in memory, kept for trainings: JSONL in `data/<64 hex digits>/`, under the home of their tenant.
#
# The digits are a hash of the content, and a recipe's source has them (`turret.data.memory`). In a folder store the
# files are there; a store by URL has them as artifacts. `collect` removes what no version and no unfinished training
# names.


ROWS_FOLDER = "data"
ROWS_WHY = "rows that no version and no unfinished training names"
_ROWS_PLACE = re.compile(r"(?:tenants/[^/]+/)?data/([0-9a-f]{64})(?=/)", re.ASCII)
_NAMED = re.compile("rows:[0-9]+:([0-9a-f]{64})", re.ASCII)


def keep_rows(root: Path, home: Path, artifacts: Artifacts, source: str) -> None:
    """Copy the rows of a source from this process into the store, unless it has them. Raises StoreError.

    Args:
        root: the store's folder on this machine.
        home: the tenant's folder in it.
    """
    here, kept = memory.folder_of(source), home / ROWS_FOLDER / memory.digest_of(source)
    with scratch.disk_errors("the rows cannot be kept", kept, "make room"):
        if not kept.exists() and here.exists():
            make_folder(root, PRIVATE)
            _place_rows(here, kept, permissions(root))
        artifacts.keep(kept.glob("*.jsonl"))


def bring_rows(root: Path, home: Path, artifacts: Artifacts, source: str) -> None:
    """Make the rows of a source readable in this process, if the store has them. Raises StoreError."""
    here, kept = memory.folder_of(source), home / ROWS_FOLDER / memory.digest_of(source)
    if here.exists():
        return
    artifacts.bring(f"{kept.relative_to(root).as_posix()}/")
    with scratch.disk_errors("the rows cannot be copied", here, "make room"):
        if kept.exists():
            _place_rows(kept, here, 0o700)


def _unneeded_rows(connection: Connection, root: Path, artifacts: Artifacts) -> tuple[list[Path], list[Artifact]]:
    """Folders of this machine, and files of the store, that nothing has named for an hour."""
    needed, before = _needed_rows(connection), time.time() - OLD
    local = [
        path
        for _, folder in _folders(root, ROWS_FOLDER)
        for path in sorted(folder.glob("*"))
        if path.is_dir()
        and path.stat().st_mtime < before
        and path.name not in needed
        and not path.name.startswith(GONE)
    ]
    return local, [
        each
        for prefix in (f"{ROWS_FOLDER}/", "tenants/")
        for each in artifacts.list_files_in(connection, prefix)
        if (found := _ROWS_PLACE.match(each.path)) and found[1] not in needed and each.changed < timestamp(before)
    ]


def _place_rows(source: Path, target: Path, mode: int) -> None:
    """Copy a folder of files whole: it appears under its name when all of it is on the disk."""
    make_folder(target.parent, mode)
    beside = target.with_name(f"{uuid.uuid4().hex}.new")
    try:
        make_folder(beside, mode)
        for path in source.glob("*.jsonl"):
            shutil.copyfile(path, beside / path.name)
            (beside / path.name).chmod(mode & 0o666)
            sync(beside / path.name)
        place_folder(beside, target)
        sync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _needed_rows(connection: Connection) -> set[str]:
    """The digests of rows that a version or an unfinished training or cell names."""
    text = cast(versions.c.manifest, Text)
    unfinished = jobs.c.state.in_((*OPEN_STATES, "interrupted"))
    named = (
        select(text).where(text.contains("rows:")),
        select(jobs.c.recipe).where(unfinished, jobs.c.recipe.contains("rows:")),
    )
    return {
        digest for query in named for each in connection.execute(query).scalars() for digest in _NAMED.findall(each)
    }
