"""Rows that were in memory, kept for trainings: JSONL in `data/<64 hex digits>/`, under the home of their tenant.

The digits are a hash of the content, and a recipe's source has them (`turret.data.memory`). In a folder store the files
are there; a store by URL has them as artifacts. `collect` removes what no version and no unfinished training names.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, Text, cast, select

from turret.data import memory
from turret.database import TRAINING, Database, jobs, versions
from turret.disk import PRIVATE, describe_error, make_folder, permissions, sync
from turret.errors import StoreError
from turret.store.artifacts import Artifact, Artifacts
from turret.store.gc import OLD, Removed
from turret.store.runs import PREFIX
from turret.timestamp import timestamp

FOLDER = "data"
WHY = "rows that no version and no unfinished training names"
_PLACE = re.compile(r"(?:tenants/[^/]+/)?data/([0-9a-f]{64})(?=/)", re.ASCII)
_NAMED = re.compile("rows:[0-9]+:([0-9a-f]{64})", re.ASCII)


def keep(root: Path, home: Path, artifacts: Artifacts, source: str) -> None:
    """Copy the rows of a source from this process into the store, unless it has them. Raises StoreError.

    Args:
        root: the store's folder on this machine.
        home: the tenant's folder in it.
    """
    here, kept = memory.folder_of(source), home / FOLDER / memory.digest_of(source)
    try:
        if not kept.exists() and here.exists():
            make_folder(root, PRIVATE)
            _place(here, kept, permissions(root))
        artifacts.keep(kept.glob("*.jsonl"))
    except OSError as error:
        raise StoreError(f"the rows cannot be kept: {describe_error(error, kept)}: make room") from error


def bring(root: Path, home: Path, artifacts: Artifacts, source: str) -> None:
    """Make the rows of a source readable in this process, if the store has them. Raises StoreError."""
    here, kept = memory.folder_of(source), home / FOLDER / memory.digest_of(source)
    if here.exists():
        return
    artifacts.bring(f"{kept.relative_to(root).as_posix()}/")
    try:
        if kept.exists():
            _place(kept, here, 0o700)
    except OSError as error:
        raise StoreError(f"the rows cannot be copied: {describe_error(error, here)}: make room") from error


def collect(root: Path, database: Database, artifacts: Artifacts, *, dry_run: bool) -> Iterator[Removed]:
    """Remove rows that nothing names, after an hour, from the store and from this machine."""
    with database.reading() as connection:
        stored, sizes = _unneeded(connection, root, artifacts)
    if (stored or sizes) and not dry_run:  # without anything to remove a disk without room is no obstacle
        with database.writing() as connection:
            stored, sizes = _unneeded(connection, root, artifacts)
            dead = [blob for each in stored for blob in artifacts.drop(connection, each.path)]
            for path in sizes:
                shutil.rmtree(path, ignore_errors=True)
        artifacts.discard(dead)
    yield from (Removed(each.path, each.blob.bytes, WHY) for each in stored)
    yield from (Removed(path.relative_to(root).as_posix(), size, WHY) for path, size in sizes.items())


def _unneeded(connection: Connection, root: Path, artifacts: Artifacts) -> tuple[list[Artifact], dict[Path, int]]:
    """Listed files and folders of this machine that nothing has named for an hour; the folders with their bytes."""
    needed, before = _needed(connection, root, artifacts), time.time() - OLD
    listed = [each for prefix in (f"{FOLDER}/", "tenants/") for each in artifacts.listed_in(connection, prefix)]
    stored = [
        each
        for each in listed
        if (found := _PLACE.match(each.path)) and found[1] not in needed and each.changed < timestamp(before)
    ]
    local = [
        path
        for path in sorted([*root.glob(f"{FOLDER}/*"), *root.glob(f"tenants/*/{FOLDER}/*")])
        if path.is_dir() and path.name not in needed and path.stat().st_mtime < before
    ]
    return stored, {path: sum(each.stat().st_size for each in path.iterdir()) for path in local}


def _place(source: Path, target: Path, mode: int) -> None:
    """Copy a folder of files whole: it appears under its name when all of it is on the disk."""
    make_folder(target.parent, mode)
    beside = target.with_name(f"{uuid.uuid4().hex}.new")
    try:
        make_folder(beside, mode)
        for path in source.glob("*.jsonl"):
            shutil.copyfile(path, beside / path.name)
            (beside / path.name).chmod(mode & 0o666)
            sync(beside / path.name)
        try:
            os.replace(beside, target)
        except OSError:  # another process has just placed the same content
            if not target.exists():
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _needed(connection: Connection, root: Path, artifacts: Artifacts) -> set[str]:
    """The digests of rows that a version or an unfinished training names."""
    text = cast(versions.c.manifest, Text)
    texts = list(connection.execute(select(text).where(text.contains("rows:"))).scalars())
    unfinished = (jobs.c.kind == TRAINING) & jobs.c.state.in_(("running", "interrupted"))
    for run in connection.execute(select(jobs.c.id).where(unfinished)).scalars():
        path = f"{PREFIX}{run}/recipe.toml"
        content = artifacts.read(path) if artifacts.copies else None
        if content is None and (root / path).exists():
            content = (root / path).read_bytes()
        texts.append((content or b"").decode("utf-8", "replace"))
    return {digest for each in texts for digest in _NAMED.findall(each)}
