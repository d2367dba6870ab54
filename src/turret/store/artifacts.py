"""Files of runs and comparisons that the store keeps: curves, checkpoints, results of cells, reports, queued data.

In a folder store they are the files under its root. A store by URL has a copy of each: a row in the table `artifacts`,
by its path under the root, and the content among the files of bundles. The local files are then working copies:

- `keep` copies local files to the store, in the transaction that checks the lease of the work
- `bring` copies the store's files to this machine, if they are missing or differ

A copy is written under an upload of its own (`turret.store.uploads`), and becomes the content of its path in one
transaction. The content that it replaces is dead then, and is removed at once; after a kill a gc removes it.
"""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from sqlalchemy import Connection, delete, insert, select

from turret.database import Database, artifacts
from turret.disk import make_folder, sync
from turret.errors import BundleError, Corrupt, StoreError, TurretError
from turret.manifest import Manifest
from turret.store import uploads
from turret.store.blobs import Blob, Files, blob_path, hash_file
from turret.store.catalog import now, plain_path

# --- incoming bundle --------------------------------------------------------------------------------------------------
# A bundle that is offered to the store: read its manifest, and check its files against it.


MANIFEST = "manifest.json"
_LIMIT = 16 << 20  # bytes; a manifest has a few thousand


def read_bundle(bundle: Path) -> tuple[Manifest, dict[str, Path]]:
    """Read the manifest of a bundle.

    Returns:
        The manifest, and the files that it names by their path in the bundle, with the manifest itself.

    Raises:
        BundleError: the manifest or a file is missing, foreign or unsafe.
    """
    path = bundle / MANIFEST
    try:
        if _plain_file(path).st_size > _LIMIT:
            raise BundleError(f"{path} is larger than {_LIMIT} bytes: this is not a bundle that turret wrote")
        manifest: Manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{bundle} is not a bundle: {MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    has_files = isinstance(listed, dict) and all(isinstance(each, dict) for each in listed.values())
    if not has_files or not isinstance(manifest.get("digest"), str):
        raise BundleError(f"{path} lacks 'digest' or 'files': this is not a bundle that turret wrote")
    named = [MANIFEST, *manifest["files"]]
    for name in named:
        if not plain_path(name):
            raise BundleError(f"{path} names {name!r}: expected relative paths inside the bundle")
        try:
            _plain_file(bundle / name)
        except OSError as error:
            raise BundleError(f"{path} names {name!r}: {error.strerror}") from error
    return manifest, {name: bundle / name for name in named}


def _plain_file(path: Path) -> os.stat_result:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path} is not a regular file: links and devices are not stored")
    return found


def hash_bundle(manifest: Manifest, paths: Mapping[str, Path]) -> dict[str, Blob]:
    """Path in the bundle -> digest and size; raises BundleError if a digest differs from the manifest."""
    try:
        content = {name: hash_file(path) for name, path in paths.items()}
    except OSError as error:
        raise BundleError(f"{error.filename} cannot be read: {error.strerror}") from error
    for name, entry in manifest["files"].items():
        if entry.get("sha256") != content[name].digest.removeprefix("sha256:"):
            raise BundleError(f"{paths[name]} does not match the digest in {MANIFEST}: the bundle was changed")
    return content


# --- artifacts --------------------------------------------------------------------------------------------------------


Used = TypeVar("Used")

ATTEMPTS = 3  # if the content is replaced while it is read, or a gc removes an upload


class Holder(Protocol):
    """The lease of the work that wrote files, or the run that a process holds."""

    def require(self, connection: Connection) -> None:
        """Raise LeaseLost if the work is another's now, or has ended."""


@dataclass(frozen=True)
class Artifact:
    """A file that the store keeps."""

    path: str  # under the store's root
    blob: Blob
    changed: str


class Artifacts:
    """The files of runs and comparisons of one store.

    Args:
        root: the store's folder on this machine.
        database: opens the catalog.
        files: where the content is; None for a folder store, which has no copies.
        claim: called before the first write.
    """

    def __init__(
        self, root: Path, database: Callable[[], Database], files: Files | None, claim: Callable[[Database], None]
    ) -> None:
        self._root, self._database, self._claim = root, database, claim
        self._files = files

    @property
    def copies(self) -> bool:
        """Whether the store has copies of the local files."""
        return self._files is not None

    def keep(self, paths: Iterable[Path], holder: Holder | None = None) -> None:
        """Copy local files under the root to the store, unless it has the same content already.

        Args:
            holder: of the work that wrote the files.

        Raises:
            LeaseLost: another process has taken the work, or it has ended; nothing is changed.
        """
        sources = {path.relative_to(self._root).as_posix(): path for path in paths}
        self.keep_as({name: path for name, path in sources.items() if path.exists()}, holder)

    def keep_as(
        self,
        sources: dict[str, Path],
        holder: Holder | None = None,
        also: Callable[[Connection], None] = lambda connection: None,
    ) -> None:
        """As `keep`, for files that lie elsewhere on this machine.

        Args:
            also: called in the transaction after which the store has all of them.
        """
        if self._files is None or not sources:
            return
        database = self._database()
        self._claim(database)
        content = {name: hash_file(path) for name, path in sources.items()}
        for _ in range(ATTEMPTS):
            with database.writing() as connection:
                _require(holder, connection)
                known = _rows(connection, content)
                changed = {name: blob for name, blob in content.items() if known.get(name) != blob}
                if not changed:
                    also(connection)
                    return
                upload = uploads.begin(connection)
            copies = {blob.digest: (sources[name], replace(blob, upload=upload)) for name, blob in changed.items()}
            uploads.write(database, self._place, upload, copies.values())
            with uploads.given_up_on_error(database, upload), database.writing() as connection:
                _require(holder, connection)
                known = _rows(connection, content)
                others_stay = all(known.get(name) == blob for name, blob in content.items() if name not in changed)
                if not uploads.end(connection, upload) or not others_stay:
                    continue  # a gc took this process for dead, or removed what it did not copy
                connection.execute(delete(artifacts).where(artifacts.c.path.in_(list(changed))))
                for name, blob in changed.items():
                    row = {"path": name, "digest": blob.digest, "bytes": blob.bytes, "upload": upload, "changed": now()}
                    connection.execute(insert(artifacts).values(row))
                also(connection)
            self.discard(known[name] for name in changed if name in known)
            return
        raise StoreError(
            f"{next(iter(sources))} was not stored: `turret gc` removed its copy {ATTEMPTS} times: try again"
        )

    def list_files(self, prefix: str) -> Sequence[Artifact]:
        """The files in the store whose path begins with the prefix, by path."""
        if self._files is None:
            return []
        with self._database().reading() as connection:
            return self.list_files_in(connection, prefix)

    def list_files_in(self, connection: Connection, prefix: str) -> list[Artifact]:
        """As `list_files`, in a transaction."""
        query = select(artifacts).where(artifacts.c.path.startswith(prefix, autoescape=True))
        rows = connection.execute(query.order_by(artifacts.c.path)).all()
        return [Artifact(row.path, Blob(row.digest, row.bytes, row.upload), row.changed) for row in rows]

    def read(self, path: str) -> bytes | None:
        """The content of one file in the store; None if there is none."""

        def content(blob: Blob) -> bytes:
            with self._place.checked_file(blob) as file:
                return file.read_bytes()

        return self._using(path, content)

    def bring(self, prefix: str) -> None:
        """Copy files whose path begins with the prefix to this machine, unless they are there with the same content."""
        for each in self.list_files(prefix):
            target = self._root / each.path
            if not target.exists() or hash_file(target) != each.blob:
                self._bring(each.path, target)

    def drop(self, connection: Connection, prefix: str) -> list[Blob]:
        """Remove files from the catalog. Returns their content for `discard`, after the transaction."""
        dropped = [each.blob for each in self.list_files_in(connection, prefix)]
        connection.execute(delete(artifacts).where(artifacts.c.path.startswith(prefix, autoescape=True)))
        return dropped

    def discard(self, dead: Iterable[Blob]) -> None:
        """Remove content that a committed transaction no longer lists. What an outage leaves, a gc removes."""
        for blob in dead:
            with suppress(TurretError, OSError):
                self._place.remove(f"blobs/sha256/{blob_path(blob)}")

    # --- private ------------------------------------------------------------------------------------------------------

    @property
    def _place(self) -> Files:
        assert self._files is not None
        return self._files

    def _bring(self, path: str, target: Path) -> None:
        make_folder(target.parent)
        beside = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            self._using(path, lambda blob: self._place.copy(blob, beside))
            if beside.exists():
                sync(beside)
                os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)

    def _using(self, path: str, use: Callable[[Blob], Used]) -> Used | None:
        """Read the content of a path; again, if it was replaced in the meantime. None if there is none."""
        for last in (False, False, True):
            with self._database().reading() as connection:
                blob = _rows(connection, [path]).get(path)
            if blob is None:
                return None
            try:
                return use(blob)
            except Corrupt:
                with self._database().reading() as connection:
                    current = _rows(connection, [path]).get(path)
                if last or (current is not None and current.upload == blob.upload):
                    raise
        return None


def _require(holder: Holder | None, connection: Connection) -> None:
    if holder is not None:
        holder.require(connection)


def _rows(connection: Connection, names: Iterable[str]) -> dict[str, Blob]:
    rows = connection.execute(select(artifacts).where(artifacts.c.path.in_(list(names))))
    return {row.path: Blob(row.digest, row.bytes, row.upload) for row in rows}
