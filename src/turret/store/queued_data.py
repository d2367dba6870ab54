"""The data of jobs in the queue: files in `queued/<32 hex digits>/`, which the recipe of a run names.

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
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

from sqlalchemy import Connection, select

from turret.access import DEFAULT
from turret.database import Database, jobs
from turret.disk import bytes_below, make_folder, sync
from turret.store import scratch
from turret.store.artifacts import Artifact, Artifacts
from turret.store.blobs import Blob
from turret.store.gc import Removed
from turret.visibility import access_of

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
        return any(
            each.path == path or each.path.startswith(f"{path}/") for each in artifacts.listed_in(connection, path)
        )
    return (root / path).exists()


def collect(root: Path, database: Database, artifacts: Artifacts, *, dry_run: bool) -> Iterator[Removed]:
    """Remove the data that no waiting or running training names, from the store and from this machine."""
    with database.reading() as connection:
        local, listed = _unneeded(connection, root, artifacts)
    dead: list[Blob] = []
    if (local or listed) and not dry_run:
        with database.writing() as connection:
            local, listed = _unneeded(connection, root, artifacts)
            dead = [blob for each in listed for blob in artifacts.drop(connection, each.path)]
            for path in local:
                path.rename(path.with_name(f"{GONE}{uuid.uuid4().hex[:8]}-{path.name}"))
        artifacts.discard(dead)
    yield from (Removed(each.path, each.blob.bytes, WHY) for each in listed)
    gone = [path for _, folder in _folders(root) for path in sorted(folder.glob(f"{GONE}*"))]
    for path in [*(local if dry_run else ()), *gone]:
        size = bytes_below(path)
        if not dry_run:
            shutil.rmtree(path, ignore_errors=True)
        yield Removed((path.parent.relative_to(root) / path.name.rpartition("-")[2]).as_posix(), size, WHY)


def _folders(root: Path) -> list[tuple[str, Path]]:
    """Tenant and folder of all data on this machine."""
    others = [(path.parent.name, path) for path in sorted(root.glob(f"tenants/*/{FOLDER}"))]
    return [(DEFAULT, root / FOLDER), *others]


def _unneeded(connection: Connection, root: Path, artifacts: Artifacts) -> tuple[list[Path], list[Artifact]]:
    """The folders of this machine, and the files of the store, whose data no waiting or running training names."""
    open_ = jobs.c.queued.is_not(None) & jobs.c.state.in_(("waiting", "running"))
    rows = connection.execute(select(jobs.c.tenant, jobs.c.recipe, jobs.c.spec).where(open_)).all()
    texts = [(row.tenant, text) for row in rows for text in (row.recipe, (row.spec or {}).get("source")) if text]
    needed = {(tenant, place) for tenant, text in texts for place in PLACE.findall(text)}
    local = [
        path
        for tenant, folder in _folders(root)
        for path in sorted(folder.glob("*"))
        if _NAME.fullmatch(path.name) and (tenant, path.name) not in needed
    ]
    stored = [
        (each, match)
        for top in (FOLDER, "tenants")
        for each in artifacts.listed_in(connection, f"{top}/")
        if (match := _STORED.fullmatch(each.path))
    ]
    return local, [each for each, match in stored if (match[1] or DEFAULT, match[2]) not in needed]


def _move(new: Path, target: Path) -> None:
    if not target.exists():
        make_folder(target.parent)
        os.replace(new, target)
        sync(target.parent)
