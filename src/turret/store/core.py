"""The store: put a bundle in, and get the same bytes back by its reference.

A folder, or a catalog on PostgreSQL with its files elsewhere (`turret.location`); format `turret.database.SCHEMA`:

- `turret.db`, or the PostgreSQL catalog: names, versions, aliases and runs (`turret.database`)
- `blobs/`, `tmp/`: the files of all bundles, in a folder (`turret.store.blobs`) or an object store
  (`turret.store.blobs`); `turret.store.uploads` explains how put and gc run at the same time
- `runs/`, `comparisons/`, `controls/`, `data/`, `scratch/`: working folders on this machine; a store by URL has copies
  of the files of runs and comparisons, and of kept rows (`turret.store.artifacts`)

A put writes the files first and the rows last, in one transaction. After a kill every listed version is whole, and the
rest is files that no version lists. Content that is already stored under the name keeps its number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from sqlalchemy import Connection

from turret import audit
from turret.access import DEFAULT, OPERATOR, Access
from turret.data.memory import is_rows_source
from turret.database import Database, plain_errors
from turret.disk import PRIVATE, make_folder
from turret.errors import BadReference, Corrupt, NotFound, StoreError
from turret.json_types import JsonObject, Plain
from turret.location import Location
from turret.manifest import Manifest
from turret.reference import Reference, check_alias, check_name
from turret.sqlite import no_room
from turret.store import aliases, artifacts, catalog, gates, golden, promises, queued_data, runs, scratch, upkeep
from turret.store.access_tokens import AccessTokens
from turret.store.aliases import Move, MoveRow, Pointing
from turret.store.artifacts import Artifacts
from turret.store.blobs import OWNER, Blob, Blobs, Files, Objects
from turret.store.catalog import PRODUCTION, Deleted, Version, now, who
from turret.store.gates import Gate, GateStatus
from turret.store.golden import Golden, GoldenReplay, GoldenSet
from turret.store.panels import Panels
from turret.store.queued_data import collect as collect_queued
from turret.store.runs import HeldRun, RunRow, State, TrainingRuns
from turret.store.scratch import Removed
from turret.store.upkeep import Collected, Verified
from turret.store.uploads import Upload
from turret.tasks.shapes import Metrics, SplitMetrics

if TYPE_CHECKING:
    from turret.store.difference import Difference


# --- facts ------------------------------------------------------------------------------------------------------------
# Everything that the store knows about one version, as `turret show --json` prints it.


class StoredFile(TypedDict):
    """A file of a version."""

    digest: str
    bytes: int


class VersionFacts(TypedDict):
    """Everything that the store knows about a version."""

    version: str
    digest: str
    created: str
    who: str | None
    aliases: list[str]
    bytes: int
    metrics: SplitMetrics
    files: dict[str, StoredFile]
    manifest: Manifest
    alias_history: list[MoveRow]
    replays: list[JsonObject]  # `GoldenReplay.as_json`
    run: RunRow | None
    comparison: str | None
    promise: JsonObject | None  # `Promise.as_json`


def describe_version(database: Database, version: Version, content: Mapping[str, Blob]) -> VersionFacts:
    """Files, metrics, aliases and their moves, manifest, and the run of a version.

    Args:
        content: path in the bundle -> its stored copy.
    """
    with database.reading() as connection:
        moves = aliases.moves(connection, version.name)
        replays = golden.replays_of(connection, version)
        promise = promises.of_digest(connection, version.digest)
    return {
        "version": str(version),
        "digest": version.digest,
        "created": version.created,
        "who": version.who,
        "aliases": list(version.aliases),
        "bytes": version.bytes,
        "metrics": dict(version.metrics),
        "files": {path: {"digest": blob.digest, "bytes": blob.bytes} for path, blob in content.items()},
        "manifest": version.manifest,
        "alias_history": moves,
        "replays": [replay.as_json() for replay in replays.values()],
        "run": runs.find(database, version.run) if version.run else None,
        "comparison": version.comparison,
        "promise": None if promise is None else promise.as_json(),
    }


# --- ownership --------------------------------------------------------------------------------------------------------
# Which catalog owns a place of files.
#
# A gc removes what its catalog does not list, so two catalogs must not share a place. A catalog has an id, which the
# file `catalog` next to `blobs/` holds from the first put on. A folder store needs none, because its database is in
# the same folder.


def claim_files(location: Location, database: Database, files: Files, *, writes: bool) -> None:
    """Record that the files belong to this catalog.

    Raises:
        StoreError: they belong to another catalog, this one lost its id, or the user may not write.
    """
    if writes and not database.writable():
        raise StoreError(f"store {location} is read-only for this user: grant INSERT, or connect as another user")
    identity, owner = database.identity(), files.owner()
    if identity is None:
        raise StoreError(
            f"store {location}: its catalog has lost its id, the comment on the table alembic_version in a dump: "
            f"set it to the content of {location.files}/{OWNER}"
        )
    if owner is None:
        files.claim(identity)
        owner = files.owner()
    if owner != identity:
        raise StoreError(
            f"store {location}: {location.files} has the files of another catalog ({owner}, this is {identity}): "
            f"use another place; if that catalog is gone, delete {location.files}/{OWNER} first"
        )


# --- core -------------------------------------------------------------------------------------------------------------


Also = Callable[[Connection], None] | None  # further writes in the transaction that moves an alias
ATTEMPTS = 8  # of a put, if a gc or a delete removes its files while it writes


class _Shared:
    """The catalog and the files of one store, which all accesses to it share."""

    def __init__(self, location: Location) -> None:
        self.location, self.root = location, location.local
        self.catalog = location if location.catalog else location.local / "turret.db"
        self.files: Files = Blobs(location.files) if isinstance(location.files, Path) else Objects(location.files)
        self._database: Database | None = None
        self.owns_files = location.catalog is None  # the files are known to belong to this catalog

    def open(self) -> Database | None:
        """The database, opened once; None if the store does not exist."""
        if self._database is None:
            self._database = Database.find_catalog(self.catalog)
        return self._database

    def open_or_create(self) -> Database:
        """The database, created if the store does not exist."""
        if (existing := self.open()) is not None:
            return existing
        if isinstance(self.catalog, Path):
            if self.root.exists() and not self.root.is_dir():
                raise StoreError(f"store {self.root} is a file: expected a folder, use another --store")
            if (self.root / OWNER).exists():
                raise StoreError(f"store {self.root} has the files of a catalog elsewhere: use another --store")
            with plain_errors(self.catalog):
                make_folder(self.root, PRIVATE)
        self._database = Database.open_catalog(self.catalog)
        return self._database


class Store:
    """A store of adapters, as one tenant sees it: a folder, or a URL. Nothing is created before the first write.

    Methods that take a reference raise `NotFound` if it names nothing. The error lists the existing names.
    """

    def __init__(
        self, where: Location | Path | str, access: Access = OPERATOR, *, shared: _Shared | None = None
    ) -> None:
        self.access = access
        self._shared = shared or _Shared(Location.parse(where))
        self.location = self._shared.location
        self.root = self._shared.root  # on this machine: all of a folder store; the runs of a store with a URL
        self._catalog, self._blobs = self._shared.catalog, self._shared.files
        self._opened: Database | None = None  # as the access sees it

    def __str__(self) -> str:
        return str(self.location)

    @property
    def home(self) -> Path:
        """Where the comparisons of this tenant are, on this machine."""
        return self.root if self.access.tenant == DEFAULT else self.root / "tenants" / self.access.tenant

    def tenants(self) -> Sequence[str]:
        """Every tenant with an adapter or a token. Only for who holds the store: a server tells it nobody."""
        with self._reading() as connection:
            return [] if connection is None else catalog.tenants(connection)

    def with_access(self, access: Access) -> Store:
        """The same store as another tenant, or one of its tokens, sees it."""
        return Store(self.location, access, shared=self._shared)

    # --- versions -----------------------------------------------------------------------------------------------------

    def put(
        self,
        name: str,
        bundle: Path,
        *,
        run: str | HeldRun | None = None,
        metrics: SplitMetrics | None = None,
        comparison: str | None = None,
        inputs: Sequence[bytes] = (),
        result: Callable[[Version], Mapping[str, Plain]] | None = None,
    ) -> Version:
        """Store a bundle as the next version of a name, or return the version that already has this content.

        Args:
            bundle: a folder with a manifest.
            run: the training that made it, or its id.
            metrics: split -> metric -> value.
            comparison: the folder of the comparison that trained it, such as `comparisons/news-3f2a91c07b`. A plain
                name never means the version, until `production` names it.
            inputs: embeddings of the examples of the bundle's promise (`turret.store.promises`).
            result: makes the result of a training that this process holds. Then the version is listed and the training
                finished in one transaction: a training has one version, or none.

        Raises:
            BundleError: the folder is not a bundle, or its files differ from its manifest.
            LeaseLost: the training has ended, or another process has taken it over.
        """
        held, run = (run, run.id) if isinstance(run, HeldRun) else (None, run)
        check_name(name)
        manifest, paths = artifacts.read_bundle(bundle)
        content = artifacts.hash_bundle(manifest, paths)
        database = self._open_or_create()
        with plain_errors(self._catalog):
            self._claim_files(database)
        made, dead = None, list[Blob]()
        for _ in range(ATTEMPTS):
            upload = Upload(database, self._blobs)
            with plain_errors(self._catalog):
                upload.write({blob: paths[path] for path, blob in content.items()})
            with database.writing() as connection:
                if held is not None:
                    held.require(connection)
                copies = upload.settle(connection, content.values())
                if copies is not None:
                    stored = {path: copies[blob.digest] for path, blob in content.items()}
                    number = catalog.add(
                        connection, name, manifest, stored, run=run, metrics=metrics or {}, comparison=comparison
                    )
                    made = catalog.find(connection, Reference(name, version=number))
                    promises.take_from_bundle(connection, made, inputs)
                    if held is not None and result is not None:
                        ending = self.training_runs(database).end_in
                        dead = ending(connection, held, "finished", error=None, result=result(made))
            if made is not None:
                self.artifacts.discard(dead)
                return made
        raise StoreError(
            f"{name} was not stored: `turret gc` removed its files {ATTEMPTS} times while they were being written: "
            "try again when no `turret gc` runs"
        )

    def resolve(self, reference: str | Reference) -> Version:
        """The version that a reference means now.

        A plain name means `@production` if it exists, else the newest version that no comparison trained.
        """
        parsed = reference if isinstance(reference, Reference) else Reference.parse(reference)
        with self._existing(parsed).reading() as connection:
            return catalog.find(connection, parsed)

    def list(self, name: str | None = None) -> Sequence[Version]:
        """All versions, or those of one name, ordered by name and number."""
        if name is not None:
            check_name(name)
        with self._reading() as connection:
            return [] if connection is None else catalog.list_versions(connection, name)

    def files(self, reference: str | Reference) -> dict[str, Path]:
        """Map each path in the bundle to a local file whose bytes were hashed again; raises Corrupt.

        It is the stored file itself. With an object store it is a copy that is removed together with this object.
        """
        version, content = self._look_up(reference)
        with self._still_listed(version):
            return {path: self._blobs.local(blob) for path, blob in content.items()}

    def materialize(self, reference: str | Reference, folder: Path) -> Version:
        """Copy the bundle into `folder`, hashing each file on the way; raises Corrupt."""
        version, content = self._look_up(reference)
        with self._still_listed(version), plain_errors(folder / artifacts.MANIFEST):
            for path, blob in content.items():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._blobs.copy(blob, target)
        return version

    def show(self, reference: str | Reference) -> VersionFacts:
        """Everything known about a version: files, metrics, aliases and their moves, manifest, and its run."""
        version, content = self._look_up(reference)
        return describe_version(self._existing(), version, content)

    def exists(self) -> bool:
        """Whether the store exists; creates nothing."""
        return self._catalog.exists() if isinstance(self._catalog, Path) else self._open() is not None

    def writable(self) -> bool:
        """Whether the store may be written, or created if it does not exist."""
        if isinstance(self._catalog, Path):
            existing = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
            return os.access(existing, os.W_OK)
        database = self._open()
        return database is None or database.writable()

    def problems(self) -> Sequence[str]:
        """Files of listed versions that are missing or have another size. Quick, because it hashes nothing."""
        database = self._open()
        with plain_errors(self._catalog):
            return [] if database is None else upkeep.missing_files(database, self._blobs)

    def diff(self, first: str, second: str, *, weights: bool = True) -> Difference:
        """Compare two versions: manifests, metrics, and how far the weights of the second are from the first.

        Args:
            weights: whether their files are read for that.
        """
        from turret.store.difference import difference  # imports numpy

        a, b = self.resolve(first), self.resolve(second)
        files_a, files_b = (self.files(each.reference) if weights else {} for each in (a, b))
        return difference(a, b, files_a, files_b)

    # --- aliases ------------------------------------------------------------------------------------------------------

    def promote(self, reference: str, alias: str, *, require: Iterable[str] = (), also: Also = None) -> Move:
        """Move an alias to a version whose files match their digests and that passes the gates of the alias.

        Args:
            require: further gates for this promotion, such as `accuracy>=0.9`.
            also: further writes, in the transaction that moves the alias.

        Raises:
            GateFailed: a metric or golden examples do not pass.
            ReplayNeeded: golden examples were not yet replayed on the version; see `keep_replay`.
            Corrupt: a file is damaged.
        """
        check_alias(alias)
        required = [Gate.parse(text) for text in require]
        version, content = self._look_up(reference)
        with self._still_listed(version):
            for blob in content.values():
                self._blobs.check(blob)
        with self._existing(version.reference).writing() as connection:
            version = catalog.find(connection, version.reference)
            gates.check_gates(version, alias, [*gates.metric_gates_of(connection, version.name, alias), *required])
            replays = golden.check(connection, version, alias)
            if also is not None:
                also(connection)
            return replace(aliases.move_alias(connection, version, alias), replays=replays)

    def rollback(self, name: str, alias: str = PRODUCTION) -> Move:
        """Move an alias back to the version it named before; repeated rollbacks go further back.

        Raises:
            Corrupt: a file of that version is damaged.
        """
        database = self._existing(Reference(check_name(name), alias=check_alias(alias)))
        while True:  # until no other process moves the alias while this one checks the files
            with database.writing() as connection:  # fails first if the store is read-only
                version = catalog.find(connection, Reference(name, version=aliases.back_from(connection, name, alias)))
                content = catalog.content_of(connection, version)
            damage = self._damage(version, content)
            with database.writing() as connection:
                if aliases.back_from(connection, name, alias) != version.number:
                    continue
                move = aliases.rollback(connection, name, alias)
                if damage:
                    raise Corrupt(f"{name}@{alias} stays at {move.before}: {damage}")
                return move

    def back_to(self, reference: str, alias: str, *, leaving: Sequence[str], also: Also = None) -> Move | None:
        """Move an alias back to a version if it names one of `leaving` or nothing. Checks no gate and hashes nothing.

        Returns:
            The move, or None if the alias names another version and stays.
        """
        exact = Reference.parse(reference)
        database = self._existing(exact)
        with database.reading() as connection:
            version = catalog.find(connection, exact)
            content = catalog.content_of(connection, version)
        damage = self._damage(version, content)
        with database.writing() as connection:
            if also is not None:
                also(connection)
            move = aliases.back_to(connection, catalog.find(connection, exact), check_alias(alias), leaving)
            if move is not None and damage:
                raise Corrupt(f"{exact.name}@{alias} stays where it is: {damage}")
            return move

    def _damage(self, version: Version, content: Mapping[str, Blob]) -> str | None:
        """A quick check of the files, because a rollback must be quick; loading the version hashes them."""
        for path, blob in content.items():
            if problem := self._blobs.glance(blob):
                return f"{version} is damaged, {path} {problem}"
        return None

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
        """Change the gates of an alias, and return the gates after that.

        Args:
            alias: None for the gates of all aliases of the name; then nothing may be changed.
            add, remove: gates such as `accuracy>=0.9`; remove also takes metrics and names of golden sets.
            examples: golden examples to add.
            share: the share of `examples` that must pass, in (0, 1]; default 1.
        """
        reference = Reference(check_name(name), alias=None if alias is None else check_alias(alias))
        least_share = golden.check_share(share, examples)
        added, removed = [Gate.parse(text, alias or "") for text in add], list(remove)
        if not added and not removed and examples is None:
            with self._existing(reference).reading() as connection:
                return gates.gates_of(connection, name, alias)
        if alias is None:
            raise BadReference(f"a gate of {name} needs an alias, such as production")
        with self._existing(reference).writing() as connection:
            before = gates.gates_of(connection, name, alias)
            for text in removed:
                remove_gate = golden.remove if text.strip().startswith(golden.WORD) else gates.remove
                remove_gate(connection, name, alias, text)
            for gate in added:
                gates.add(connection, name, gate)
            if examples is not None:
                golden.add(connection, name, alias, examples, least_share)
            after = gates.gates_of(connection, name, alias)
            was, now_is = ({"gates": [*map(str, each)]} for each in (before, after))
            audit.record(connection, "gate", f"{name}@{alias}", name, before=was, after=now_is, at=now(), who=who())
            return after

    def gate_status(self, name: str, alias: str | None = None) -> Sequence[GateStatus]:
        """Whether the version that each alias names passes its gates now, gate by gate."""
        reference = Reference(check_name(name), alias=None if alias is None else check_alias(alias))
        with self._existing(reference).reading() as connection:
            return gates.gate_statuses(connection, name, alias)

    def examples(self, digest: str) -> GoldenSet:
        """The golden examples with this digest; raises Corrupt."""
        with self._existing().reading() as connection:
            return golden.content_of(connection, digest)

    def keep_replay(self, version: Version, replay: GoldenReplay) -> None:
        """Record the result of golden examples on a version; the newest of a set counts."""
        with self._existing(version.reference).writing() as connection:
            golden.record(connection, catalog.find(connection, version.reference), replay)

    def keep_metrics(self, version: Version, split: str, values: Metrics) -> None:
        """Record metrics that were measured later; they replace those of the same split. The digest stays."""
        with self._existing(version.reference).writing() as connection:
            catalog.keep_metrics(connection, catalog.find(connection, version.reference), split, values)

    def pointing(self) -> tuple[int, Sequence[Pointing]]:
        """The number of the newest move, and all aliases at that moment. A server polls this."""
        with self._reading() as connection:
            return (
                (0, ())
                if connection is None
                else (aliases.last_move(connection), aliases.aliases_pointing_to(connection))
            )

    def last_move(self) -> int:
        """The number of the newest move of any alias. If it is unchanged, no alias moved."""
        with self._reading() as connection:
            return 0 if connection is None else aliases.last_move(connection)

    @property
    def tokens(self) -> AccessTokens:
        """Access tokens for a server of this store."""
        return AccessTokens(self._open, self._open_or_create)

    @property
    def panels(self) -> Panels:
        """Lists of questions that adapters answer."""
        return Panels(self._open, self._open_or_create)

    def database(self, *, make: bool = False) -> Database:
        """The catalog, for tables of other packages; raises NotFound unless the store exists or `make` is set."""
        return self._open_or_create() if make else self._existing()

    # --- upkeep -------------------------------------------------------------------------------------------------------

    def delete(self, reference: str, *, force: bool = False) -> Deleted:
        """Remove a version from the catalog. Its number is never used again; the next gc removes its files.

        Raises:
            InUse: an experiment runs with it; or, without `force`, an alias names it or a version was made from it.
        """
        parsed = Reference.parse(reference)
        if parsed.version is None and parsed.alias is None:
            raise BadReference(f"delete {parsed}: expected one version, such as {parsed}@3 or {parsed}@candidate")
        with self._existing(parsed).writing() as connection:
            return aliases.delete_version(connection, parsed, force=force)

    def verify(self, reference: str | None = None) -> Verified:
        """Hash and open every file again, of the whole store or of one version."""
        parsed = None if reference is None else Reference.parse(reference)
        return upkeep.verify(self._existing(parsed), self._blobs, parsed)

    def gc(self, *, dry_run: bool = False) -> Collected:
        """Remove files that nothing refers to, or only list them. Safe while other processes use the store."""
        with plain_errors(self._catalog):
            removed = list(upkeep.remove_leftovers(self._blobs, dry_run=dry_run))
            removed += scratch.leftovers(self.root, dry_run=dry_run)
            try:
                removed += list(self._collect_garbage(self._open(), dry_run))
            except StoreError:
                if not isinstance(self._catalog, Path) or not no_room(self._catalog):
                    raise
                removed += list(self._collect_garbage(Database.open_catalog(self._catalog, alone=True), dry_run))
        return Collected(dry_run, tuple(removed))

    # --- runs ---------------------------------------------------------------------------------------------------------

    @property
    def artifacts(self) -> Artifacts:
        """The files of runs and comparisons that the store keeps."""
        files = None if self.location.catalog is None else self._blobs
        return Artifacts(self.root, self._open_or_create, files, self._claim_files)

    def keep_rows(self, source: str) -> None:
        """Keep the rows in memory that a recipe's source names, for other processes; nothing for other sources."""
        if is_rows_source(source):
            self._open_or_create()
            queued_data.keep_rows(self.root, self.home, self.artifacts, source)

    def bring_rows(self, source: str) -> None:
        """Make such rows readable in this process, if the store has them; nothing for other sources."""
        if is_rows_source(source) and self.exists():
            queued_data.bring_rows(self.root, self.home, self.artifacts, source)

    def training_runs(self, database: Database | None = None) -> TrainingRuns:
        """Every operation on runs; raises NotFound if the store does not exist."""
        return TrainingRuns(database or self._existing(), self.root, self.artifacts)

    def new_run(self, name: str, recipe_toml: str, data_digest: str) -> HeldRun:
        """Start a run of this recipe. This process holds it until `end_run`, while `TrainingRuns.keeper` renews it."""
        found = self.training_runs(self._open_or_create())
        with plain_errors(self._catalog):
            return found.begin(check_name(name), recipe_toml, data_digest)

    def unfinished_run(
        self, recipe_toml: str, data_digest: str, say: Callable[[str], None] = lambda line: None
    ) -> HeldRun | None:
        """A killed or interrupted run of this recipe and data, which this process then holds; or None.

        Args:
            say: called with a line before this process waits to see whether another one is alive.
        """
        if (database := self._open()) is None:
            return None
        with plain_errors(self._catalog):
            return self.training_runs(database).take_up(recipe_toml, data_digest, say)

    def runs(self, most: int = 500) -> Sequence[RunRow]:
        """The newest training runs, newest first."""
        return [] if (database := self._open()) is None else runs.list_runs(database, most)

    def run(self, run_id: str) -> RunRow:
        """One training run; raises NotFound."""
        found = runs.find(self._existing(), run_id)
        if found is None:
            raise NotFound(f"no run {ascii(run_id)[:60]}: `turret train` makes one")
        return found

    def end_run(
        self, run: HeldRun, state: State, *, error: str | None = None, result: Mapping[str, Plain] | None = None
    ) -> None:
        """End the run as `finished`, `interrupted` (it can be resumed) or `failed`. Raises LeaseLost."""
        self.training_runs(self._open_or_create()).end(run, state, error=error, result=result)

    # --- private ------------------------------------------------------------------------------------------------------

    def _look_up(self, reference: str | Reference) -> tuple[Version, dict[str, Blob]]:
        parsed = reference if isinstance(reference, Reference) else Reference.parse(reference)
        with self._existing(parsed).reading() as connection:
            version = catalog.find(connection, parsed)
            return version, catalog.content_of(connection, version)

    @contextmanager
    def _still_listed(self, version: Version) -> Iterator[None]:
        """Turn Corrupt into NotFound if the version was deleted while its files were read."""
        try:
            yield
        except Corrupt:
            self.resolve(version.reference)
            raise

    @contextmanager
    def _reading(self) -> Iterator[Connection | None]:
        """A reading transaction; None if the store does not exist."""
        database = self._open()
        with nullcontext() if database is None else database.reading() as connection:
            yield connection

    def _existing(self, reference: Reference | None = None) -> Database:
        """The database of a store that must exist; raises NotFound, which names `reference`."""
        database = self._open()
        if database is None:
            missing = f"no {reference}" if reference else "nothing to read"
            raise NotFound(f"{missing}: there is no store at {self}; `turret train` makes one")
        return database

    def _collect_garbage(self, database: Database | None, dry_run: bool) -> Iterator[Removed]:
        if database is None:
            return
        # Without an owner this catalog has put nothing there.
        if self._shared.owns_files or self._blobs.owner() is not None:
            self._claim_files(database, writes=not dry_run)
            yield from upkeep.remove_unlisted(self._blobs, database, dry_run=dry_run)
        yield from upkeep.remove_of_runs(self.root, database, dry_run=dry_run)
        yield from collect_queued(self.root, database, self.artifacts, dry_run=dry_run)
        yield from upkeep.remove_of_promises(database, dry_run=dry_run)

    def _claim_files(self, database: Database, *, writes: bool = True) -> None:
        if not self._shared.owns_files:
            claim_files(self.location, database, self._blobs, writes=writes)
            self._shared.owns_files = writes

    def _open(self) -> Database | None:
        """The database, opened once; None if the store does not exist."""
        if self._opened is None:
            found = self._shared.open()
            self._opened = None if found is None else found.with_access(self.access)
        return self._opened

    def _open_or_create(self) -> Database:
        """The database, created if the store does not exist."""
        if self._opened is None:
            self._opened = self._shared.open_or_create().with_access(self.access)
        return self._opened
