"""The store: put a bundle in, get it back by reference, for ever the same. Refuses to know what is inside the tensors.

On disk, under the root (format `turret.database.SCHEMA`):

- `turret.db`: names, versions, aliases and runs (`turret.database`)
- `blobs/`, `tmp/`: the files of all bundles (`turret.store.blobs`)
- `runs/`: a folder a training (`turret.store.runs`)

A put writes the files first and the rows last, in one transaction: after a kill at any moment every listed version is
whole, and what was not listed is only unlisted files. Content that is under the name already keeps its number.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from turret.database import Database, told
from turret.errors import BundleError, NotFound, StoreError
from turret.reference import Reference, check_name
from turret.store import catalog, runs
from turret.store.blobs import Blob, Blobs
from turret.store.catalog import Version
from turret.store.runs import Run, State

MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 16 << 20  # bytes; a manifest is a few thousand


class Store:
    """A folder of adapters. Nothing is made on disk before the first write."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._blobs = Blobs(self.root)
        self._opened: Database | None = None

    # --- versions -----------------------------------------------------------------------------------------------------

    def put(
        self, name: str, bundle: Path, *, run: str | None = None, metrics: Mapping[str, Any] | None = None
    ) -> Version:
        """Store the bundle as the next version of `name`; the same content again is the version it was."""
        check_name(name)
        manifest, paths = _read_bundle(bundle)
        database = self._made()
        with told(database.path):
            content = {path: self._blobs.put(file) for path, file in paths.items()}
        _agree(manifest, content, bundle)
        with database.writing() as connection:
            number = catalog.add(connection, name, manifest, content, run=run, metrics=metrics or {})
            return catalog.find(connection, Reference(name, version=number))

    def resolve(self, reference: str | Reference) -> Version:
        """What the reference means now. A plain name means `@production` where that exists, else the newest."""
        wanted = reference if isinstance(reference, Reference) else Reference.parse(reference)
        database = self._database()
        if database is None:
            raise NotFound(f"no {wanted}: there is no store at {self.root}; `turret train` makes one")
        with database.reading() as connection:
            return catalog.find(connection, wanted)

    def list(self, name: str | None = None) -> Sequence[Version]:
        """All versions, or those of one name, by name and number."""
        database = self._database()
        if database is None:
            return []
        with database.reading() as connection:
            return catalog.listed(connection, name)

    def files(self, reference: str | Reference) -> dict[str, Path]:
        """Path in the bundle -> file in the store, hashed again; raises Corrupt."""
        _, content = self._look_up(reference)
        return {path: self._blobs.check(blob.digest) for path, blob in content.items()}

    def materialize(self, reference: str | Reference, folder: Path) -> Version:
        """Lay the bundle out in `folder`, hashed on its way, as a copy that nobody else writes to; raises Corrupt."""
        version, content = self._look_up(reference)
        with told(folder / MANIFEST):
            for path, blob in content.items():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._blobs.copy(blob.digest, target)
        return version

    def show(self, reference: str | Reference) -> dict[str, Any]:
        """All that is known of a version: files, metrics, aliases and their moves, manifest, and its run."""
        version, content = self._look_up(reference)
        database = self._made()
        with database.reading() as connection:
            moves = catalog.moves(connection, version.name)
        return {
            "version": str(version),
            "digest": version.digest,
            "created": version.created,
            "aliases": list(version.aliases),
            "bytes": version.bytes,
            "metrics": dict(version.metrics),
            "files": {path: {"digest": blob.digest, "bytes": blob.bytes} for path, blob in content.items()},
            "manifest": dict(version.manifest),
            "alias_history": moves,
            "run": runs.find(database, version.run) if version.run else None,
        }

    def problems(self) -> Sequence[str]:
        """Files of listed versions that are missing or of another size: a quick look, which hashes nothing."""
        database = self._database()
        if database is None:
            return []
        with database.reading() as connection:
            content = catalog.contents(connection)
        found = []
        for reference, path, blob in content:
            file = self._blobs.path(blob.digest)
            if not file.is_file() or file.stat().st_size != blob.bytes:
                found.append(f"{reference}: {path} is {'cut' if file.is_file() else 'missing'} ({file})")
        return found

    # --- runs ---------------------------------------------------------------------------------------------------------

    def new_run(self, name: str, recipe_toml: str, data_digest: str) -> Run:
        """A new training of that recipe, held by this process until `end_run`."""
        database = self._made()
        with told(database.path):
            return runs.begin(database, self.root / "runs", check_name(name), recipe_toml, data_digest)

    def unfinished_run(self, recipe_toml: str, data_digest: str) -> Run | None:
        """A training of that recipe on that data that was killed or interrupted; now held by this process."""
        database = self._database()
        if database is None:
            return None
        with told(database.path):
            return runs.take_up(database, self.root / "runs", recipe_toml, data_digest)

    def end_run(
        self, run: Run, state: State, *, error: str | None = None, result: Mapping[str, Any] | None = None
    ) -> None:
        """Let go of the run: `finished`, `interrupted` (can be taken up again) or `failed`."""
        runs.end(self._made(), run, state, error=error, result=result)

    # --- the inside ---------------------------------------------------------------------------------------------------

    def _look_up(self, reference: str | Reference) -> tuple[Version, dict[str, Blob]]:
        version = self.resolve(reference)
        with self._made().reading() as connection:
            return version, catalog.content_of(connection, version)

    def _database(self) -> Database | None:
        """The database, opened once; None where there is no store yet."""
        if self._opened is None:
            path = self.root / "turret.db"
            with told(path):
                if not path.exists():
                    return None
                writable = os.access(self.root, os.W_OK) and os.access(path, os.W_OK)
            self._opened = Database(path, read_only=not writable)
        return self._opened

    def _made(self) -> Database:
        """The database, made where there is none yet."""
        if (there := self._database()) is not None:
            return there
        path = self.root / "turret.db"
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"store {self.root} is a file: expected a folder, use another --store")
        with told(path):
            self.root.mkdir(parents=True, exist_ok=True)
            self._opened = Database(path)
        return self._opened


def _read_bundle(bundle: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The manifest, and the files it names with itself; raises BundleError before anything is stored."""
    path = bundle / MANIFEST
    try:
        if _plain_file(path).st_size > _MANIFEST_LIMIT:
            raise BundleError(f"{path} is larger than {_MANIFEST_LIMIT} bytes: this is not a bundle that turret wrote")
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{bundle} is not a bundle: {MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("digest"), str) or "files" not in manifest:
        raise BundleError(f"{path} lacks 'digest' or 'files': this is not a bundle that turret wrote")
    named = [MANIFEST, *manifest["files"]]
    for name in named:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or "\0" in name or str(inside) != name:
            raise BundleError(f"{path} names {name!r}: expected plain paths inside the bundle")
        try:
            _plain_file(bundle / name)
        except OSError as error:
            raise BundleError(f"{path} names {name!r}: {error.strerror}") from error
    return manifest, {name: bundle / name for name in named}


def _plain_file(path: Path) -> os.stat_result:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path} is not a plain file: links and devices are not stored")
    return found


def _agree(manifest: Mapping[str, Any], content: Mapping[str, Blob], bundle: Path) -> None:
    """What was stored is what the manifest says; raises BundleError."""
    for name, said in manifest["files"].items():
        if said.get("sha256") != content[name].digest.removeprefix("sha256:"):
            raise BundleError(f"{bundle / name} does not match the digest in {MANIFEST}: the bundle was changed")
