"""Files that clients sent to a server, and the answers of their batches. Each belongs to an owner: nobody else sees it.

The content lies among the files of bundles, under an upload of its own (`turret.store.uploads`): it is written under an
id that the catalog knows, and then listed in one transaction. A deleted file is removed by a gc.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Row, delete, func, insert, select

from turret.database import Database
from turret.errors import NotFound, StoreError, TooLarge
from turret.store import uploads
from turret.store.blobs import Blob, Files, hash_file
from turret.store.client_tables import client_files
from turret.store.core import Store

ATTEMPTS = 3  # if a gc takes this process for dead
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
        database, blob = self._database(), hash_file(source)
        self._claim(database)
        made = ClientFile(f"file-{secrets.token_hex(12)}", owner, name[:255], purpose, blob, int(time.time()))
        for _ in range(ATTEMPTS):
            with database.writing() as connection:
                total = select(func.coalesce(func.sum(client_files.c.bytes), 0)).where(client_files.c.owner == owner)
                if int(connection.execute(total).scalar_one()) + blob.bytes > MOST_BYTES:
                    raise TooLarge(f"your files would have more than {MOST_BYTES} bytes together: delete some first")
                upload = uploads.begin(connection)
            uploads.write(database, self._place, upload, [(source, replace(blob, upload=upload))])
            with database.writing() as connection:
                if uploads.end(connection, upload):
                    row = {"id": made.id, "owner": owner, "name": made.name, "purpose": purpose, "bytes": blob.bytes}
                    row |= {"digest": blob.digest, "upload": upload, "created": made.created}
                    connection.execute(insert(client_files).values(row))
                    return replace(made, blob=replace(blob, upload=upload))
        raise StoreError(
            f"{name} was not stored: `turret gc` removed it {ATTEMPTS} times while it was written: try again"
        )

    def listed(
        self, owner: str, *, purpose: str | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[ClientFile]:
        """The newest files of an owner, those after another one of them."""
        query = select(client_files).where(client_files.c.owner == owner)
        if purpose is not None:
            query = query.where(client_files.c.purpose == purpose)
        if after is not None:
            last = self.find(owner, after)
            older = client_files.c.created < last.created
            same = (client_files.c.created == last.created) & (client_files.c.id < last.id)
            query = query.where(older | same)
        query = query.order_by(client_files.c.created.desc(), client_files.c.id.desc()).limit(limit)
        with self._database().reading() as connection:
            return [_file(row) for row in connection.execute(query)]

    def find(self, owner: str, id: str) -> ClientFile:
        """One file of an owner. Raises NotFound, also for a file of somebody else."""
        query = select(client_files).where(client_files.c.id == id, client_files.c.owner == owner)
        with self._database().reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFound(f"no file {ascii(id)[:60]}: GET /v1/files lists yours")
        return _file(row)

    def delete(self, owner: str, id: str) -> None:
        """Remove a file of an owner from the catalog. Raises NotFound."""
        found = self.find(owner, id)
        with self._database().writing() as connection:
            connection.execute(delete(client_files).where(client_files.c.id == found.id))

    @contextmanager
    def content(self, file: ClientFile) -> Iterator[Path]:
        """The content as a local file, whose bytes were hashed again, for the length of the block. Raises Corrupt."""
        with self._place.checked_file(file.blob) as path:
            yield path


def _file(row: Row[tuple[str, str, str, str, str, int, str, int]]) -> ClientFile:
    return ClientFile(row.id, row.owner, row.name, row.purpose, Blob(row.digest, row.bytes, row.upload), row.created)
