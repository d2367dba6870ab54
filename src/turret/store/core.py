"""The store: put a bundle in, get it back by reference, for ever the same. Refuses to know what is inside the tensors.

A folder, or a catalog on PostgreSQL with the files beside it (`turret.location`), format `turret.database.SCHEMA`:

- `turret.db`, or that catalog: names, versions, aliases and runs (`turret.database`)
- `blobs/`, `tmp/`: the files of all bundles, in a folder or an object store (`turret.store.blobs`, `.objects`); how
  puts and gcs keep out of each other's way is said in `turret.store.uploads`
- `runs/`: a folder a training, always on this machine (`turret.store.runs`)
- `scratch/`: what imports and exports that are at work need, always on this machine (`turret.store.scratch`)

A put writes the files first and the rows last, in one transaction: after a kill at any moment every listed version is
whole, and what was not listed is only unlisted files. Content that is under the name already keeps its number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turret.database import Database, told
from turret.disk import PRIVATE, make_folder
from turret.errors import BadReference, Corrupt, InUse, NotFound, StoreError
from turret.location import Location
from turret.reference import Reference, check_alias, check_name
from turret.sqlite import no_room
from turret.store import aliases, catalog, gate_status, gc, golden, incoming_bundle, ownership, promotion, runs, scratch
from turret.store import verify as verifying
from turret.store.access_tokens import AccessTokens
from turret.store.aliases import Move, Pointing
from turret.store.blobs import OWNER, Blob, Blobs, Files
from turret.store.catalog import PRODUCTION, Deleted, Version
from turret.store.gate_status import GateStatus
from turret.store.gates import Gate
from turret.store.gc import Collected, Removed
from turret.store.golden import Golden, GoldenReplay, GoldenSet
from turret.store.objects import Objects
from turret.store.promotion import Also
from turret.store.runs import HeldRun, State
from turret.store.uploads import Upload
from turret.store.verify import Verified

if TYPE_CHECKING:
    from turret.store.difference import Difference

ATTEMPTS = 3  # of a put whose files others collect or delete while it writes


class Store:
    """A place for adapters: a folder, or a URL. Nothing is made before the first write."""

    def __init__(self, where: Location | Path | str) -> None:
        self.location = Location.parse(where)
        self.root = self.location.local  # on this machine: the whole of a folder store; of any other, its runs
        self._catalog = self.location if self.location.catalog else self.root / "turret.db"
        files = self.location.files
        self._blobs: Files = Blobs(files) if isinstance(files, Path) else Objects(files)
        self._opened: Database | None = None
        self._owned = self.location.catalog is None  # the files are known to be this catalog's

    def __str__(self) -> str:
        return str(self.location)

    # --- versions -----------------------------------------------------------------------------------------------------

    def put(
        self, name: str, bundle: Path, *, run: str | None = None, metrics: Mapping[str, Any] | None = None
    ) -> Version:
        """Store the bundle as the next version of `name`; the same content again is the version it was."""
        check_name(name)
        manifest, paths = incoming_bundle.read(bundle)
        content = incoming_bundle.hashed(manifest, paths)
        database = self._made()
        with told(self._catalog):
            self._own(database)
        for _ in range(ATTEMPTS):
            upload = Upload(database, self._blobs)
            with told(self._catalog):
                upload.write({blob: paths[path] for path, blob in content.items()})
            with database.writing() as connection:
                copies = upload.settle(connection, content.values())
                if copies is not None:
                    kept = {path: copies[blob.digest] for path, blob in content.items()}
                    number = catalog.add(connection, name, manifest, kept, run=run, metrics=metrics or {})
                    return catalog.find(connection, Reference(name, version=number))
        raise StoreError(
            f"{name} was not stored: its files were collected {ATTEMPTS} times while they were being written: "
            "try again when no `turret gc` runs"
        )

    def resolve(self, reference: str | Reference) -> Version:
        """What the reference means now. A plain name means `@production` where that exists, else the newest."""
        wanted = reference if isinstance(reference, Reference) else Reference.parse(reference)
        with self._there(wanted).reading() as connection:
            return catalog.find(connection, wanted)

    def list(self, name: str | None = None) -> Sequence[Version]:
        """All versions, or those of one name, by name and number."""
        if name is not None:
            check_name(name)
        database = self._database()
        if database is None:
            return []
        with database.reading() as connection:
            return catalog.listed(connection, name)

    def files(self, reference: str | Reference) -> dict[str, Path]:
        """Path in the bundle -> a file to read, hashed again; raises Corrupt.

        It is the stored file, or a copy that lasts as long as this object where the files are in an object store.
        """
        version, content = self._look_up(reference)
        try:
            return {path: self._blobs.local(blob) for path, blob in content.items()}
        except Corrupt:
            self._still_listed(version)
            raise

    def materialize(self, reference: str | Reference, folder: Path) -> Version:
        """Lay the bundle out in `folder`, hashed on its way, as a copy that nobody else writes to; raises Corrupt."""
        version, content = self._look_up(reference)
        try:
            with told(folder / incoming_bundle.MANIFEST):
                for path, blob in content.items():
                    target = folder / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._blobs.copy(blob, target)
        except Corrupt:
            self._still_listed(version)
            raise
        return version

    def show(self, reference: str | Reference) -> dict[str, Any]:
        """All that is known of a version: files, metrics, aliases and their moves, manifest, and its run."""
        version, content = self._look_up(reference)
        database = self._made()
        with database.reading() as connection:
            moves = aliases.moves(connection, version.name)
            replays = golden.replays_of(connection, version)
        return {
            "version": str(version),
            "digest": version.digest,
            "created": version.created,
            "who": version.who,
            "aliases": list(version.aliases),
            "bytes": version.bytes,
            "metrics": dict(version.metrics),
            "files": {path: {"digest": blob.digest, "bytes": blob.bytes} for path, blob in content.items()},
            "manifest": dict(version.manifest),
            "alias_history": moves,
            "replays": [replay.as_json() for replay in replays.values()],
            "run": runs.find(database, version.run) if version.run else None,
        }

    def exists(self) -> bool:
        """Whether there is a store; nothing is made."""
        return self._catalog.exists() if isinstance(self._catalog, Path) else self._database() is not None

    def writable(self) -> bool:
        """Whether it may be written, or made where there is none."""
        if isinstance(self._catalog, Path):
            there = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
            return os.access(there, os.W_OK)
        database = self._database()
        return database is None or database.writable()

    def problems(self) -> Sequence[str]:
        """Files of listed versions that are missing or of another size: a quick look, which hashes nothing."""
        database = self._database()
        if database is None:
            return []
        with database.reading() as connection:
            content = catalog.contents(connection)
        with told(self._catalog):
            said = self._blobs.glances({blob.digest: blob for _, _, blob in content}.values())
        return [f"{reference}: {path} {said[blob.digest]}" for reference, path, blob in content if blob.digest in said]

    def diff(self, first: str, second: str) -> Difference:
        """Two versions side by side, and how far the weights of the second are from those of the first."""
        from turret.store.difference import difference  # loads numpy, which nothing else here needs

        a, b = self.resolve(first), self.resolve(second)
        files_a, files_b = (self.files(Reference(each.name, version=each.number)) for each in (a, b))
        return difference(a, b, files_a, files_b)

    # --- aliases ------------------------------------------------------------------------------------------------------

    def promote(self, reference: str, alias: str, *, require: Iterable[str] = (), also: Also = None) -> Move:
        """Move an alias to a version whose files hash right and that passes the alias's gates and `require`.

        Golden examples are gates too: raises ReplayNeeded for those that were never put to it, see `keep_replay`.
        """
        check_alias(alias)
        wanted = [Gate.parse(text) for text in require]
        version = self.resolve(reference)
        exact = Reference(version.name, version=version.number)
        self._check(exact)
        with self._there(exact).writing() as connection:
            return promotion.promote(connection, catalog.find(connection, exact), alias, wanted, also)

    def rollback(self, name: str, alias: str = PRODUCTION) -> Move:
        """Move an alias back to what it named before; again and again walks further back."""
        exact = Reference(check_name(name), alias=check_alias(alias))
        return promotion.rollback(self._there(exact), self._blobs, name, alias)

    def back_to(self, reference: str, alias: str, *, leaving: Sequence[str], also: Also = None) -> Move | None:
        """Move an alias back to a version, where it names one of `leaving` or nothing; asks no gate, hashes nothing.

        None where it names something else, which stays.
        """
        exact = Reference.parse(reference)
        return promotion.back_to(self._there(exact), self._blobs, exact, alias, leaving, also)

    def gate(
        self,
        name: str,
        alias: str | None = None,
        *,
        add: Iterable[str] = (),
        remove: Iterable[str] = (),
        examples: GoldenSet | None = None,
        share: float | None = None,
    ) -> Sequence[Gate | Golden]:
        """The gates of a name's alias (of all its aliases where left out), after taking some away and adding some."""
        wanted = Reference(check_name(name), alias=None if alias is None else check_alias(alias))
        part = golden.check_share(share, examples)
        added, removed = [Gate.parse(text, alias or "") for text in add], list(remove)
        if not added and not removed and examples is None:
            with self._there(wanted).reading() as connection:
                return promotion.gates_of(connection, name, alias)
        if alias is None:
            raise BadReference(f"a gate of {name} needs an alias: say which, such as production")
        with self._there(wanted).writing() as connection:
            promotion.change_gates(connection, name, alias, added, removed)
            if examples is not None:
                golden.keep(connection, name, alias, examples, part)
            return promotion.gates_of(connection, name, alias)

    def standing(self, name: str, alias: str | None = None) -> Sequence[GateStatus]:
        """Whether the version that the alias (or each alias) names passes the alias's gates now, gate by gate."""
        wanted = Reference(check_name(name), alias=None if alias is None else check_alias(alias))
        with self._there(wanted).reading() as connection:
            return gate_status.of(connection, name, alias)

    def examples(self, digest: str) -> GoldenSet:
        """The golden examples of that digest; raises Corrupt."""
        with self._there(None).reading() as connection:
            return golden.content_of(connection, digest)

    def keep_replay(self, version: Version, replay: GoldenReplay) -> None:
        """Keep how a version did on golden examples; the newest of a set counts."""
        exact = Reference(version.name, version=version.number)
        with self._there(exact).writing() as connection:
            golden.record(connection, catalog.find(connection, exact), replay)

    def pointing(self) -> tuple[int, Sequence[Pointing]]:
        """(the number of the newest move, every alias as it points then): what a server follows."""
        database = self._database()
        if database is None:
            return 0, ()
        with database.reading() as connection:
            return aliases.last_move(connection), aliases.pointing(connection)

    def last_move(self) -> int:
        """The number of the newest move of any alias: while it stays, `pointing` does too."""
        database = self._database()
        if database is None:
            return 0
        with database.reading() as connection:
            return aliases.last_move(connection)

    @property
    def tokens(self) -> AccessTokens:
        """Who may ask a server of this store."""
        return AccessTokens(self._database, self._made)

    def database(self, *, make: bool = False) -> Database:
        """The catalog's transactions, for what is kept beside the versions; raises NotFound where there is no store."""
        return self._made() if make else self._there(None)

    # --- upkeep -------------------------------------------------------------------------------------------------------

    def delete(self, reference: str, *, force: bool = False) -> Deleted:
        """Take a version out of the catalog; its number is never given again, its files go with the next gc."""
        wanted = Reference.parse(reference)
        if wanted.version is None and wanted.alias is None:
            raise BadReference(f"delete {wanted}: expected one version, such as {wanted}@3 or {wanted}@candidate")
        with self._there(wanted).writing() as connection:
            version = catalog.find(connection, wanted)
            if catalog.tried(connection, version):
                raise InUse(
                    f"{version} is not deleted: an experiment runs with it; `turret experiment stop {version.name}`"
                )
            made_from_it = catalog.children(connection, version)
            if not force and (version.aliases or made_from_it):
                uses = [f"{version.name}@{alias} names it" for alias in version.aliases]
                uses += [f"{child} was made from it" for child in made_from_it]
                raise InUse(f"{version} is not deleted: {', '.join(uses)}: promote another version first, or --force")
            aliases.forget(connection, catalog.row_of(connection, version))
            return catalog.remove(connection, version)

    def verify(self, reference: str | None = None) -> Verified:
        """Hash and open everything again, or all of one version."""
        wanted = None if reference is None else Reference.parse(reference)
        return verifying.verify(self._there(wanted), self._blobs, wanted)

    def gc(self, *, dry_run: bool = False) -> Collected:
        """Remove what nothing refers to, or say what that is; safe beside everything else."""
        with told(self._catalog):
            removed = list(gc.leftovers(self._blobs, dry_run=dry_run))
            removed += [Removed(*each, scratch.WHY) for each in scratch.leftovers(self.root, dry_run=dry_run)]
            try:
                removed += list(self._collected(self._database(), dry_run))
            except StoreError:
                if not isinstance(self._catalog, Path) or not no_room(self._catalog):
                    raise
                removed += list(self._collected(Database(self._catalog, alone=True), dry_run))
        return Collected(dry_run, tuple(removed))

    # --- runs ---------------------------------------------------------------------------------------------------------

    def new_run(self, name: str, recipe_toml: str, data_digest: str) -> HeldRun:
        """A new training of that recipe, held by this process until `end_run`."""
        database = self._made()
        with told(self._catalog):
            return runs.begin(database, self.root / "runs", check_name(name), recipe_toml, data_digest)

    def unfinished_run(self, recipe_toml: str, data_digest: str) -> HeldRun | None:
        """A training of that recipe on that data that was killed or interrupted; now held by this process."""
        database = self._database()
        if database is None:
            return None
        with told(self._catalog):
            return runs.take_up(database, self.root / "runs", recipe_toml, data_digest)

    def finished_run(self, recipe_toml: str, data_digest: str) -> dict[str, Any] | None:
        """What a training of that recipe on that data gave, if one came to its end."""
        database = self._database()
        if database is None:
            return None
        with told(self._catalog):
            return runs.finished(database, recipe_toml, data_digest)

    def runs(self, most: int = 500) -> Sequence[dict[str, Any]]:
        """What is known of the newest trainings, the newest first."""
        database = self._database()
        return [] if database is None else runs.listed(database, most)

    def run(self, run_id: str) -> dict[str, Any]:
        """What is known of one training; raises NotFound."""
        found = runs.find(self._there(None), run_id)
        if found is None:
            raise NotFound(f"no run {ascii(run_id)[:60]}: `turret train` makes one")
        return found

    def end_run(
        self, run: HeldRun, state: State, *, error: str | None = None, result: Mapping[str, Any] | None = None
    ) -> None:
        """Let go of the run: `finished`, `interrupted` (can be taken up again) or `failed`."""
        runs.end(self._made(), run, state, error=error, result=result)

    # --- the inside ---------------------------------------------------------------------------------------------------

    def _look_up(self, reference: str | Reference) -> tuple[Version, dict[str, Blob]]:
        wanted = reference if isinstance(reference, Reference) else Reference.parse(reference)
        with self._there(wanted).reading() as connection:
            version = catalog.find(connection, wanted)
            return version, catalog.content_of(connection, version)

    def _still_listed(self, version: Version) -> None:
        """Raises NotFound for a version that was deleted while its files were read."""
        self.resolve(Reference(version.name, version=version.number))

    def _there(self, wanted: Reference | None) -> Database:
        """The database of a store that must exist."""
        database = self._database()
        if database is None:
            what = f"no {wanted}" if wanted else "nothing to look at"
            raise NotFound(f"{what}: there is no store at {self}; `turret train` makes one")
        return database

    def _check(self, reference: Reference) -> None:
        """Hash the version's files again; raises Corrupt."""
        version, content = self._look_up(reference)
        try:
            for blob in content.values():
                self._blobs.check(blob)
        except Corrupt:
            self._still_listed(version)
            raise

    def _collected(self, database: Database | None, dry_run: bool) -> Iterator[Removed]:
        if database is None:
            return
        if self._owned or self._blobs.owner() is not None:  # without a mark, nothing there was put by this catalog
            self._own(database, writes=not dry_run)
            yield from gc.unlisted(self._blobs, database, dry_run=dry_run)
        yield from gc.of_runs(self.root, database, dry_run=dry_run)

    def _own(self, database: Database, *, writes: bool = True) -> None:
        if not self._owned:
            ownership.own(self.location, database, self._blobs, writes=writes)
            self._owned = writes

    def _database(self) -> Database | None:
        """The database, opened once; None where there is no store yet."""
        if self._opened is None:
            self._opened = Database.found(self._catalog)
        return self._opened

    def _made(self) -> Database:
        """The database, made where there is none yet."""
        if (there := self._database()) is not None:
            return there
        if isinstance(self._catalog, Path):
            if self.root.exists() and not self.root.is_dir():
                raise StoreError(f"store {self.root} is a file: expected a folder, use another --store")
            if (self.root / OWNER).exists():
                raise StoreError(f"store {self.root} holds the files of a catalog elsewhere: use another --store")
            with told(self._catalog):
                make_folder(self.root, PRIVATE)
        self._opened = Database(self._catalog)
        return self._opened
