"""Puts, deletes, gcs and late requests, in any order: files of listed versions exist.

The rules split a put and a gc into their steps, on the real tables. The files are a dictionary, so a removal can be
sent now and arrive later, and twice.
"""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)
from sqlalchemy import StaticPool, create_engine, select, update

from turret.access import OPERATOR
from turret.database import ACCESS, files, metadata, uploads
from turret.errors import Corrupt
from turret.reference import Reference
from turret.store import catalog
from turret.store import uploads as protocol
from turret.store.blobs import Blob, hash_file
from turret.store.uploads import Upload

Key = tuple[str, str]  # digest, upload


@dataclass
class Memory:
    """Files in a dictionary; the value tells whether each is whole."""

    there: dict[Key, bool] = field(default_factory=dict)

    def put(self, _source: Path, blob: Blob) -> None:
        assert (blob.digest, blob.upload) not in self.there, "a name was used twice"
        self.there[blob.digest, blob.upload] = True

    def check(self, blob: Blob) -> None:
        if not self.there.get((blob.digest, blob.upload)):
            raise Corrupt("missing or damaged")


class InMemory:
    """The real tables, in memory. Transactions are serialized."""

    def __init__(self) -> None:
        self._engine = create_engine("sqlite://", poolclass=StaticPool)
        metadata.create_all(self._engine)
        self.reading = self.writing = self._engine.execution_options(**{ACCESS: OPERATOR}).begin

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        self._engine.dispose()


class Protocol(RuleBasedStateMachine):
    """Three contents; each version has two of them."""

    attempts, walks, removals = Bundle("attempts"), Bundle("walks"), Bundle("removals")
    forget_first = True  # False: a gc that removes files of abandoned uploads and leaves their rows

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self.database, self.place = InMemory(), Memory()
        self.sources: dict[Blob, Path] = {}
        self.damaged: set[Key] = set()
        for content in (b"0", b"1", b"2"):
            path = folder / hashlib.sha256(content).hexdigest()
            path.write_bytes(content)
            self.sources[hash_file(path)] = path
        self.contents = list(self.sources)

    def teardown(self) -> None:
        self.database.close()
        self._folder.cleanup()

    @rule(target=attempts, leaves=st.integers(0, 2))
    def write(self, leaves: int) -> tuple[Upload, int]:
        """A put reads what is listed, and writes the rest."""
        upload = Upload(self.database, self.place)
        upload.write({blob: path for blob, path in self.sources.items() if blob != self.contents[leaves]})
        return upload, leaves

    @rule(attempt=consumes(attempts))
    def settle(self, attempt: tuple[Upload, int]) -> None:
        """The put lists its files, or has to start again."""
        upload, leaves = attempt
        wanted = [blob for blob in self.contents if blob != self.contents[leaves]]
        with self.database.writing() as connection:
            copies = upload.settle(connection, wanted)
            if copies is not None:
                manifest = {"digest": f"sha256:{leaves}"}
                number = catalog.add(
                    connection, "a", manifest, {b.digest: copies[b.digest] for b in wanted}, run=None, metrics={}
                )
                assert number > 0

    @rule(number=st.integers(1, 8))
    def delete(self, number: int) -> None:
        with self.database.writing() as connection:
            for version in catalog.list_versions(connection):
                if version.number == number:
                    catalog.remove(connection, catalog.find(connection, Reference("a", version=number)))

    @rule()
    def time_passes(self) -> None:
        """Or a clock jumps: every running put looks abandoned."""
        with self.database.writing() as connection:
            connection.execute(update(uploads).values(since="2000-01-01T00:00:00+00:00"))

    @rule(target=walks)
    def walk(self) -> list[tuple[str, Blob]]:
        """A gc reads which files exist."""
        return [(f"{digest} {upload}", Blob(digest, 1, upload)) for digest, upload in self.place.there]

    @rule(target=removals, walk=walks)
    def ask(self, walk: list[tuple[str, Blob]]) -> object:
        """The gc asks the catalog, and sends its requests; it may have read the files long before."""
        if self.forget_first:
            protocol.forget_abandoned(self.database)
        with self.database.reading() as connection:
            without = () if self.forget_first else protocol.abandoned_uploads(connection)
            dead = protocol.dead_copies(connection, walk, without=without)
        return multiple(*((blob.digest, blob.upload) for _, blob in dead))

    @rule(key=removals)
    def remove(self, key: Key) -> None:
        """One request arrives, late, and maybe for the second time."""
        self.place.there.pop(key, None)

    @rule(key=removals)
    def written_late(self, key: Key) -> None:
        """A repeated write arrives after the file was removed."""
        self.place.there[key] = True

    @rule(which=st.integers(0, 5))
    def damage(self, which: int) -> None:
        listed = sorted(self._listed())
        if listed:
            key = listed[which % len(listed)]
            self.place.there[key] = False
            self.damaged.add(key)

    @invariant()
    def what_is_listed_is_there(self) -> None:
        for key in self._listed():
            assert self.place.there.get(key) or key in self.damaged, "a version misses a file"

    @invariant()
    def a_content_has_one_listed_copy(self) -> None:
        listed = self._listed()
        assert len({digest for digest, _ in listed}) == len(listed)

    def _listed(self) -> set[Key]:
        with self.database.reading() as connection:
            return {tuple(row) for row in connection.execute(select(files.c.digest, files.c.upload))}


SMALL = settings(deadline=None, stateful_step_count=25, suppress_health_check=list(HealthCheck))
TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(SMALL, max_examples=15)


@pytest.mark.slow
class TestProtocolAtLength(Protocol.TestCase):
    settings = settings(SMALL, max_examples=150, stateful_step_count=40)


class Forgetful(Protocol):
    """Its gc removes the files of abandoned uploads and leaves their rows."""

    forget_first = False


@pytest.mark.parametrize(("kind", "misses"), [(Protocol, False), (Forgetful, True)])
def test_a_gc_that_left_the_uploads_of_what_it_removes_would_be_found_out(kind, misses) -> None:
    """The control: a put continues that assumes that its files still exist."""
    order = kind()
    attempt = order.write(leaves=0)
    walk = order.walk()
    order.time_passes()
    for key in order.ask(walk=walk).values:
        order.remove(key=key)
    order.settle(attempt=attempt)
    with pytest.raises(AssertionError, match="a version misses a file") if misses else nullcontext():
        order.what_is_listed_is_there()
    order.teardown()
