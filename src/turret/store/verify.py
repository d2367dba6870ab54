"""Looks at everything again: every byte hashed, every manifest and header opened, every alias followed.

Changes nothing and refuses to know what tensors mean. What no version lists is counted, and is no problem.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from turret.database import Database
from turret.errors import Corrupt
from turret.reference import Reference
from turret.store import aliases, catalog, golden
from turret.store.blobs import Blob, Blobs
from turret.store.catalog import Version
from turret.store.incoming import MANIFEST


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was stored."""

    where: str  # a version, an alias, golden examples, or "turret.db"
    path: str | None  # in the bundle
    problem: str

    def __str__(self) -> str:
        return f"{self.where}{f' {self.path}' if self.path else ''}: {self.problem}"


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what was found."""

    versions: int
    files: int  # of these versions; equal ones count each time
    bytes: int  # read and hashed; equal files once
    problems: tuple[Problem, ...]
    orphans: int  # files that no version lists, which `gc` removes
    orphan_bytes: int

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self), "problems": [asdict(each) for each in self.problems]}


def verify(database: Database, blobs: Blobs, reference: Reference | None = None) -> Verified:
    """One version with the aliases that name it, or the whole store; raises NotFound for a reference without one."""
    with database.reading() as connection:
        versions = [catalog.find(connection, reference)] if reference else catalog.listed(connection)
        problems = [] if reference else list(_of_database(connection))
        content: dict[str, dict[str, Blob]] = {}
        for version in versions:
            try:
                content[str(version)] = catalog.content_of(connection, version)
            except Corrupt as error:
                problems.append(Problem(str(version), None, str(error)))
    seen: dict[str, str | None] = {}
    for version in versions:
        if str(version) in content:
            problems += _of_version(version, content[str(version)], blobs, seen)
    loose = [] if reference else _orphans(database, blobs)
    with database.reading() as connection:  # what was deleted while this read it is no problem
        still = {str(version) for version in catalog.listed(connection)}
    gone = {str(version) for version in versions} - still
    addresses = {blob.digest: blob.bytes for some in content.values() for blob in some.values()}
    return Verified(
        versions=len(versions) - len(gone),
        files=sum(len(some) for name, some in content.items() if name not in gone),
        bytes=sum(addresses.values()),
        problems=tuple(problem for problem in problems if problem.where not in gone),
        orphans=len(loose),
        orphan_bytes=sum(blob.bytes for blob in loose),
    )


def _of_database(connection: Connection) -> Iterator[Problem]:
    for (said,) in connection.exec_driver_sql("PRAGMA quick_check(5)"):
        if said != "ok":
            yield Problem("turret.db", None, f"{said}: restore it from a copy")
    for row in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield Problem("turret.db", None, f"a row of {row[0]} refers to a row of {row[2]} that is not there")
    for alias in aliases.dangling(connection):
        yield Problem(alias, None, "names a version that is not listed: move it with `turret promote`")
    for where, said in golden.problems(connection):
        yield Problem(where, None, said)


def _of_version(
    version: Version, content: Mapping[str, Blob], blobs: Blobs, seen: dict[str, str | None]
) -> Iterator[Problem]:
    whole = set()
    for path, blob in content.items():
        if blob.digest not in seen:
            seen[blob.digest] = _of_file(blob, blobs)
        said = seen[blob.digest]
        if said is None:
            whole.add(path)
        else:
            yield Problem(str(version), path, said)
    if MANIFEST not in content:
        yield Problem(str(version), MANIFEST, "is not listed: delete the version, and store it again")
    elif MANIFEST in whole:
        for said in _of_manifest(version, content, blobs.path(content[MANIFEST].digest)):
            yield Problem(str(version), MANIFEST, said)
    for path in sorted(whole):
        said = _of_header(blobs.path(content[path].digest)) if path.endswith(".safetensors") else None
        if said is not None:
            yield Problem(str(version), path, said)


def _of_file(blob: Blob, blobs: Blobs) -> str | None:
    try:
        found = blobs.check(blob.digest).stat().st_size
    except Corrupt as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}: {error.filename}"
    return None if found == blob.bytes else f"has {found} bytes, and {blob.bytes} are listed"


def _of_manifest(version: Version, content: Mapping[str, Blob], path: Path) -> Iterator[str]:
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        yield f"is not JSON ({error})"
        return
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        yield "is not the manifest of a bundle"
        return
    if manifest.get("digest") != version.digest:
        yield f"has digest {str(manifest.get('digest'))[:19]}..., and {version.digest[:19]}... is listed"
    elif catalog.plain(manifest) != version.manifest:
        yield "differs from the manifest that is listed"
    said = {name: f"sha256:{entry.get('sha256')}" for name, entry in manifest["files"].items()}
    if said != {name: blob.digest for name, blob in content.items() if name != MANIFEST}:
        yield "names other files than those that are listed"


def _of_header(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open  # numpy and torch stay unloaded: no tensor is read

    try:
        with safe_open(path, framework="np") as file:
            return None if list(file.keys()) else "holds no tensor"
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        return f"is no readable safetensors file ({error})"


def _orphans(database: Database, blobs: Blobs) -> Sequence[Blob]:
    there = [blob for _, blob in blobs.walk()]
    with database.reading() as connection:  # after the walk: what a put has listed meanwhile is none
        listed = {blob.digest for _, _, blob in catalog.contents(connection)}
    return [blob for blob in there if blob.digest not in listed]
