"""Looks at everything again: every byte hashed, every manifest and header opened, every alias followed.

Changes nothing and refuses to know what tensors mean. What no version lists is counted, and is no problem.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from turret.database import Database
from turret.errors import Corrupt
from turret.reference import Reference
from turret.store import aliases, catalog, golden, uploads
from turret.store.blobs import Blob, Files
from turret.store.catalog import Version
from turret.store.incoming_bundle import MANIFEST


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was stored."""

    where: str  # a version, an alias, golden examples, or the catalog: "turret.db", "catalog"
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
    problems: tuple[Damage, ...]
    orphans: int  # files that no version lists and no put is writing, which `gc` removes
    orphan_bytes: int

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self), "problems": [asdict(each) for each in self.problems]}


def verify(database: Database, blobs: Files, reference: Reference | None = None) -> Verified:
    """One version with the aliases that name it, or the whole store; raises NotFound for a reference without one."""
    with database.reading() as connection:
        versions = [catalog.find(connection, reference)] if reference else catalog.listed(connection)
        problems = [] if reference else list(_of_database(database, connection))
        content: dict[str, dict[str, Blob]] = {}
        for version in versions:
            try:
                content[str(version)] = catalog.content_of(connection, version)
            except Corrupt as error:
                problems.append(Damage(str(version), None, str(error)))
    seen: dict[tuple[str, bool], _Look] = {}
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


def _of_database(database: Database, connection: Connection) -> Iterator[Damage]:
    for said in database.damage(connection):
        yield Damage(database.name, None, said)
    for alias in aliases.dangling(connection):
        yield Damage(alias, None, "names a version that is not listed: move it with `turret promote`")
    for where, said in golden.problems(connection):
        yield Damage(where, None, said)


@dataclass(frozen=True)
class _Look:
    """What one content has wrong: its bytes; as tensors, its header. Of a manifest, the text too."""

    broken: str | None = None
    header: str | None = None
    text: bytes = b""


def _of_version(
    version: Version, content: Mapping[str, Blob], blobs: Files, seen: dict[tuple[str, bool], _Look]
) -> Iterator[Damage]:
    looks: dict[str, _Look] = {}
    for path, blob in content.items():
        key = blob.digest, path.endswith(".safetensors")
        if key not in seen or path == MANIFEST:
            looks[path] = _look(path, blob, blobs)
            seen[key] = replace(looks[path], text=b"")
        else:
            looks[path] = seen[key]
    for path, look in looks.items():
        if look.broken is not None:
            yield Damage(str(version), path, look.broken)
    if MANIFEST not in content:
        yield Damage(str(version), MANIFEST, "is not listed: delete the version, and store it again")
    elif looks[MANIFEST].broken is None:
        for said in _of_manifest(version, content, looks[MANIFEST].text):
            yield Damage(str(version), MANIFEST, said)
    for path, look in looks.items():
        if look.broken is None and look.header is not None:
            yield Damage(str(version), path, look.header)


def _look(path: str, blob: Blob, blobs: Files) -> _Look:
    try:
        with blobs.held(blob) as file:
            found = file.stat().st_size
            if found != blob.bytes:
                return _Look(f"has {found} bytes, and {blob.bytes} are listed")
            header = _of_header(file) if path.endswith(".safetensors") else None
            return _Look(None, header, file.read_bytes() if path == MANIFEST else b"")
    except Corrupt as error:
        return _Look(str(error))
    except OSError as error:
        return _Look(f"cannot be read: {error.strerror}: {error.filename}")


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


def _orphans(database: Database, blobs: Files) -> Sequence[Blob]:
    there = list(blobs.walk())
    with database.reading() as connection:  # after the walk: what a put has listed meanwhile is none
        dead = uploads.dead(connection, there, without=uploads.abandoned(connection))
    return [blob for _, blob in dead]
