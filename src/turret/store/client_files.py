"""Files that clients sent to a server, and the answers of their batches. Each belongs to an owner: nobody else sees it.

The content lies among the files of bundles, under an upload of its own (`turret.store.uploads`): it is written under an
id that the catalog knows, and then listed in one transaction. The content of a deleted file is removed at once, or by
a gc if that fails.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Connection, Row, delete, func, insert, select, tuple_

from turret import audit
from turret.access import DEFAULT
from turret.database import Database, batches, client_files
from turret.errors import InUse, NotFound, StoreError, TooLarge, TurretError
from turret.json_types import JsonObject
from turret.store import uploads
from turret.store.blobs import Blob, Files, blob_path, hash_file
from turret.store.catalog import now, who
from turret.store.core import Store

ENDED = ("completed", "failed", "cancelled", "expired")  # states of a batch
ATTEMPTS = 3  # if a gc takes this process for dead
TABLE = "fine-tune"  # the purpose of a table to train on
ID = "file-[0-9a-f]{24}"  # the ids of all files
MOST_BYTES = 5 << 30  # of all files of one owner


@dataclass(frozen=True)
class ClientFile:
    """A file of an owner."""

    id: str
    owner: str
    name: str
    purpose: str
    blob: Blob
    created: int  # seconds since 1970


class ClientFiles:
    """The files of all owners.

    Args:
        database: opens the catalog.
        place: where the content is.
        claim: called before the first write.
    """

    def __init__(self, database: Callable[[], Database], place: Files, claim: Callable[[Database], None]) -> None:
        self._database, self._place, self._claim = database, place, claim

    @classmethod
    def of(cls, store: Store) -> ClientFiles:
        """The files of a store."""
        return cls(lambda: store.database(make=True), store._blobs, store._claim_files)

    def add(self, owner: str, name: str, purpose: str, source: Path) -> ClientFile:
        """Copy a local file into the store.

        Raises:
            TooLarge: the owner's files would have more than `MOST_BYTES`.
        """

        def note(connection: Connection, made: Sequence[ClientFile]) -> None:
            after = {"name": made[0].name, "bytes": made[0].blob.bytes}
            _audit(connection, "upload", made[0], after=after)

        return self.add_all(owner, [(name, purpose, source)], note)[0]

    def add_all(
        self,
        owner: str,
        new: Sequence[tuple[str, str, Path]],
        also: Callable[[Connection, Sequence[ClientFile]], None] = lambda connection, made: None,
    ) -> Sequence[ClientFile]:
        """As `add`, for several files; all are listed, or none.

        Args:
            new: name, purpose and source of each.
            also: called in the transaction that lists them.
        """
        database, blobs = self._database(), [hash_file(source) for _, _, source in new]
        self._claim(database)
        for _ in range(ATTEMPTS):
            with database.writing() as connection:
                _require_room(connection, owner, blobs)
                made = list[ClientFile]()
                for (name, purpose, _), blob in zip(new, blobs, strict=True):
                    id, copy = f"file-{secrets.token_hex(12)}", replace(blob, upload=uploads.begin(connection))
                    made.append(ClientFile(id, owner, name[:255], purpose, copy, int(time.time())))
            try:
                for (_, _, source), file in zip(new, made, strict=True):
                    self._place.put(source, file.blob)
                with database.writing() as connection:
                    if all(uploads.end(connection, file.blob.upload) for file in made):
                        _require_room(connection, owner, blobs)
                        for file in made:
                            connection.execute(insert(client_files).values(_row(file)))
                        also(connection, made)
                        return made
            except BaseException:
                self._give_up(database, made)
                raise
        raise StoreError(
            f"{new[0][0]} was not stored: `turret gc` removed it {ATTEMPTS} times while it was written: try again"
        )

    def _give_up(self, database: Database, made: Sequence[ClientFile]) -> None:
        """Remove what was written for files that are not listed; otherwise a gc does it after an hour."""
        with suppress(TurretError):
            for file in made:
                with database.writing() as connection:
                    dead = uploads.end(connection, file.blob.upload)  # not if they were listed, and the answer was lost
                if dead:
                    self._place.remove(f"blobs/sha256/{blob_path(file.blob)}")

    def list_files(
        self, owner: str, *, purpose: str | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[ClientFile]:
        """The newest files of an owner, those after another one of them."""
        query = select(client_files).where(client_files.c.owner == owner)
        if purpose is not None:
            query = query.where(client_files.c.purpose == purpose)
        if after is not None:
            last = self.find(owner, after)
            query = query.where(tuple_(client_files.c.created, client_files.c.id) < (last.created, last.id))
        query = query.order_by(client_files.c.created.desc(), client_files.c.id.desc()).limit(limit)
        with self._database().reading() as connection:
            return [_file(row) for row in connection.execute(query)]

    def find(self, owner: str, id: str) -> ClientFile:
        """One file of an owner. Raises NotFound, also for a file of somebody else."""
        with self._database().reading() as connection:
            return find_file(connection, owner, id)

    def delete(self, owner: str, id: str) -> None:
        """Delete a file of an owner, and its content. Raises NotFound, or InUse while an open batch reads it."""
        with self._database().writing() as connection:
            found = find_file(connection, owner, id)
            reads = (batches.c.input_file == id) & batches.c.state.not_in(ENDED)
            if connection.execute(select(batches.c.id).where(reads).limit(1)).first() is not None:
                raise InUse(f"{id} is read by a batch that has not ended: cancel the batch first")
            connection.execute(delete(client_files).where(client_files.c.id == id))
            _audit(connection, "delete file", found, before={"name": found.name, "bytes": found.blob.bytes})
        with suppress(TurretError, OSError):  # otherwise a gc removes it: no file lists this copy any more
            self._place.remove(f"blobs/sha256/{blob_path(found.blob)}")

    @contextmanager
    def content(self, file: ClientFile) -> Iterator[Path]:
        """The content as a local file, whose bytes were hashed again, for the length of the block. Raises Corrupt."""
        with self._place.checked_file(file.blob) as path:
            yield path


def tenant_of(owner: str) -> str | None:
    """The tenant of an owner of files and batches; None on a server without tokens."""
    tenant, slash, _ = owner.removeprefix("token ").partition("/")
    return tenant if slash else DEFAULT if owner else None


def find_file(connection: Connection, owner: str, id: str) -> ClientFile:
    """As `ClientFiles.find`, in a transaction."""
    query = select(client_files).where(client_files.c.id == id, client_files.c.owner == owner)
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"no file {ascii(id)[:60]}: GET /v1/files lists yours")
    return _file(row)


def room_left(connection: Connection, owner: str) -> int:
    """The bytes that the files of an owner leave."""
    used = select(func.coalesce(func.sum(client_files.c.bytes), 0)).where(client_files.c.owner == owner)
    return MOST_BYTES - int(connection.execute(used).scalar_one())


def _require_room(connection: Connection, owner: str, blobs: Sequence[Blob]) -> None:
    if sum(blob.bytes for blob in blobs) > room_left(connection, owner):
        raise TooLarge(f"your files would have more than {MOST_BYTES} bytes together: delete some first")


def _audit(connection: Connection, verb: str, file: ClientFile, **what: JsonObject) -> None:
    tenant = tenant_of(file.owner)
    audit.record(connection, verb, file.id, None, at=now(), who=who(), tenant=tenant, **what)


def _row(file: ClientFile) -> JsonObject:
    row = {"id": file.id, "owner": file.owner, "name": file.name, "purpose": file.purpose, "created": file.created}
    return row | {"bytes": file.blob.bytes, "digest": file.blob.digest, "upload": file.blob.upload}


def _file(row: Row[tuple[str, str, str, str, str, int, str, int]]) -> ClientFile:
    return ClientFile(row.id, row.owner, row.name, row.purpose, Blob(row.digest, row.bytes, row.upload), row.created)
