"""Upkeep of a store: `verify` checks it, and a gc removes files that nothing refers to.

`verify` hashes every byte, opens every manifest and tensor header, and follows every alias. It changes nothing. Files
that no version lists are counted, and are no problem.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

from sqlalchemy import Connection, select

from turret.database import Database, access_of, adapters, aliases, artifacts, jobs, seen_adapters, versions
from turret.disk import bytes_below, clock_of
from turret.errors import Corrupt, StoreError
from turret.json_types import JsonObject
from turret.postgres import plain_text
from turret.reference import Reference
from turret.store import catalog, golden, promises, uploads
from turret.store.artifacts import MANIFEST
from turret.store.blobs import Blob, Files
from turret.store.catalog import Version
from turret.store.scratch import OLD, Removed


@dataclass(frozen=True)
class Damage:
    """One thing that differs from what was stored."""

    where: str  # a version, an alias, golden examples, or the catalog: "turret.db", "catalog"
    path: str | None  # in the bundle
    problem: str

    def __str__(self) -> str:
        return f"{self.where}{f' {self.path}' if self.path else ''}: {self.problem}"


@dataclass(frozen=True)
class Verified:
    """The result of a verify."""

    versions: int
    files: int  # of these versions; equal files count each time
    bytes: int  # read and hashed; equal files of a tenant count once
    problems: tuple[Damage, ...]
    orphans: int  # files that no version lists and no put is writing, which `gc` removes
    orphan_bytes: int

    @property
    def ok(self) -> bool:
        return not self.problems

    def and_of(self, tenant: str, other: Verified) -> Verified:
        """This result with that of another tenant, whose problems are those of `tenant/name@3`."""
        theirs = tuple(replace(problem, where=f"{tenant}/{problem.where}") for problem in other.problems)
        return replace(
            self,
            versions=self.versions + other.versions,
            files=self.files + other.files,
            bytes=self.bytes + other.bytes,
            problems=self.problems + theirs,
        )

    def as_json(self) -> JsonObject:
        return {"ok": self.ok, **asdict(self), "problems": [asdict(each) for each in self.problems]}


def verify(database: Database, blobs: Files, reference: Reference | None = None) -> Verified:
    """Check one version with its aliases, or the whole store; raises NotFound for an unknown reference."""
    with database.reading() as connection:
        versions = [catalog.find(connection, reference)] if reference else catalog.list_versions(connection)
        problems = [] if reference else list(_of_database(database, connection))
        content: dict[str, dict[str, Blob]] = {}
        for version in versions:
            try:
                content[str(version)] = catalog.content_of(connection, version)
            except Corrupt as error:
                problems.append(Damage(str(version), None, str(error)))
    checked: dict[tuple[str, str], list[str]] = {}
    for version in versions:
        if str(version) in content:
            problems += _of_version(version, content[str(version)], blobs, checked)
    whole = reference is None and database.access.operates
    problems += list(_of_artifacts(database, blobs)) if whole else []
    orphans = _orphans(database, blobs) if whole else []
    with database.reading() as connection:  # versions that were deleted during the check have no problems
        gone = {str(version) for version in versions} - {str(version) for version in catalog.list_versions(connection)}
    sizes = {blob.digest: blob.bytes for some in content.values() for blob in some.values()}
    return Verified(
        versions=len(versions) - len(gone),
        files=sum(len(some) for name, some in content.items() if name not in gone),
        bytes=sum(sizes.values()),
        problems=tuple(problem for problem in problems if problem.where not in gone),
        orphans=len(orphans),
        orphan_bytes=sum(blob.bytes for blob in orphans),
    )


def missing_files(database: Database, blobs: Files) -> list[str]:
    """Files of listed versions that are missing or have another size. Hashes nothing."""
    with database.reading() as connection:
        content = catalog.contents(connection)
    found = blobs.glances({blob.digest: blob for _, _, blob in content}.values()) if content else {}
    return [f"{name}: {path} {found[blob.digest]}" for name, path, blob in content if blob.digest in found]


def _of_database(database: Database, connection: Connection) -> Iterator[Damage]:
    for problem in database.damage(connection):
        yield Damage(database.name, None, problem)
    for alias in _dangling(connection):
        yield Damage(alias, None, "names a version that is not listed: move it with `turret promote`")
    if access_of(connection).operates:  # sets are shared by content
        for where, problem in golden.problems(connection):
            yield Damage(where, None, problem)


def _dangling(connection: Connection) -> Sequence[str]:
    """`name@alias` of aliases whose version is missing. The database forbids such rows, so only damage makes them."""
    query = (
        select(adapters.c.name, aliases.c.alias)
        .join(adapters, aliases.c.adapter_id == adapters.c.id, isouter=True)
        .join(
            versions,
            (aliases.c.version_id == versions.c.id) & (aliases.c.adapter_id == versions.c.adapter_id),
            isouter=True,
        )
        .where(versions.c.id.is_(None), adapters.c.id.is_(None) | seen_adapters(connection))
    )
    return [f"{row.name}@{row.alias}" for row in connection.execute(query)]


def _of_version(
    version: Version, content: Mapping[str, Blob], blobs: Files, checked: dict[tuple[str, str], list[str]]
) -> Iterator[Damage]:
    """The problems of a version. checked: those of content that other versions have too."""
    if MANIFEST not in content:
        yield Damage(str(version), MANIFEST, "is not listed: delete the version, and store it again")
    for path, blob in content.items():
        key = blob.digest, str(version) if path == MANIFEST else PurePosixPath(path).suffix
        if key not in checked:
            checked[key] = list(_of_file(version, content, path, blobs))
        yield from (Damage(str(version), path, problem) for problem in checked[key])


def _of_file(version: Version, content: Mapping[str, Blob], path: str, blobs: Files) -> Iterator[str]:
    blob = content[path]
    try:
        with blobs.checked_file(blob) as file:
            found = file.stat().st_size
            if found != blob.bytes:
                yield f"has {found} bytes, but {blob.bytes} are listed"
            elif path == MANIFEST:
                yield from _of_manifest(version, content, file.read_bytes())
            elif path.endswith(".safetensors"):
                yield from _of_header(file)
    except Corrupt as error:
        yield str(error)
    except OSError as error:
        yield f"cannot be read: {error.strerror}: {error.filename}"


def _of_manifest(version: Version, content: Mapping[str, Blob], text: bytes) -> Iterator[str]:
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield f"is not JSON ({error})"
        return
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        yield "is not the manifest of a bundle"
        return
    if manifest.get("digest") != version.digest:
        yield f"has digest {str(manifest.get('digest'))[:19]}..., but {version.digest[:19]}... is listed"
    elif catalog.plain(manifest, plain_text) != catalog.plain(version.manifest, plain_text):
        yield "differs from the listed manifest"
    named = {name: f"sha256:{entry.get('sha256')}" for name, entry in manifest["files"].items()}
    if named != {name: blob.digest for name, blob in content.items() if name != MANIFEST}:
        yield "names other files than the listed ones"


def _of_artifacts(database: Database, blobs: Files) -> Iterator[Damage]:
    """Files of runs and comparisons. One that is replaced during the check has no problem."""
    query = select(artifacts.c.path, artifacts.c.digest, artifacts.c.bytes, artifacts.c.upload)
    with database.reading() as connection:
        rows = connection.execute(query).all()
    for path, digest, size, upload in rows:
        try:
            blobs.check(Blob(digest, size, upload))
        except Corrupt as error:
            with database.reading() as connection:
                if (digest, upload) in uploads.listed_copies(connection, artifacts):
                    yield Damage(path, None, str(error))


def _of_header(path: Path) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open  # loads no numpy or torch, since no tensor is read

    try:
        with safe_open(path, framework="np") as file:
            if not file.keys():
                yield "has no tensors"
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        yield f"is not a readable safetensors file ({error})"


def _orphans(database: Database, blobs: Files) -> Sequence[Blob]:
    existing = list(blobs.walk())
    with database.reading() as connection:  # after the walk: a put may have listed its files in the meantime
        dead = uploads.dead_copies(connection, existing, without=uploads.abandoned_uploads(connection))
    return [blob for _, blob in dead]


# --- gc ---------------------------------------------------------------------------------------------------------------
# Remove files that nothing refers to.
#
# What a gc removes, and why no running process needs it:
#
# - files that no version lists and no put is writing: no version will list them (`turret.store.uploads`), so it does
#   not matter when the removal arrives
# - leftovers in `tmp/`, and folders of runs that were never listed, after an hour without a change by the clock of
#   their disk: their writer is dead
# - the checkpoint of a finished run and the bundle that it proved: nothing resumes from them
# - the data of queued trainings that have ended (`turret.store.queued_data`)
# - the embeddings of promises that are not in force (`turret.store.promises`)


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


def remove_leftovers(files: Files, *, dry_run: bool) -> Iterator[Removed]:
    """Remove files of dead writers. Needs no database, so it can free space on a disk too full for one."""
    found = list(files.leftovers())
    now = files.clock() if found else 0.0
    for name, size, changed in found:
        if now - changed > OLD and (dry_run or files.remove(name)):
            yield Removed(name, size, "leftover of a killed writer")


def remove_unlisted(files: Files, database: Database, *, dry_run: bool) -> Iterator[Removed]:
    """Remove files that no version lists and no put is writing."""
    existing = list(files.walk())  # before the catalog is read: files written later are ignored
    with database.reading() as connection:
        dead = uploads.dead_copies(
            connection, existing, without=uploads.abandoned_uploads(connection) if dry_run else ()
        )
    yield from _remove(files, dead, dry_run)
    if not dry_run and uploads.forget_abandoned(database):  # last: a full disk may have room for this write now
        with database.reading() as connection:
            late = [each for each in uploads.dead_copies(connection, existing) if each not in dead]
        yield from _remove(files, late, dry_run)


def _remove(files: Files, dead: Iterable[tuple[str, Blob]], dry_run: bool) -> Iterator[Removed]:
    for name, blob in dead:
        if dry_run or files.remove(name):
            yield Removed(name, blob.bytes, "no version lists it")


def remove_of_runs(root: Path, database: Database, *, dry_run: bool) -> Iterator[Removed]:
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


def remove_of_promises(database: Database, *, dry_run: bool) -> Iterator[Removed]:
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
