"""Which copy of a content the catalog lists, so that put and gc work at once and a late request harms nothing.

Each attempt of a put has an id, its upload, and writes its files under names that end in it: `<digest>-<upload>`. No
other attempt has that id. The catalog says of each copy, a digest and an upload, in which state it is:

- written: the table `uploads` has its upload. The put adds that row, and commits, before it writes the first file
- listed: the table `files` has its digest and upload
- dead: neither. A copy that is dead stays dead

These are all the changes, each in a transaction of the only writer:

- a put adds an upload                                           (nothing -> written)
- a put lists what it wrote, if its upload is still there, and takes the upload away     (written -> listed, or dead)
- a put of a content that is listed lists the same copy once more                        (listed -> listed)
- a put that found the listed copy damaged lists its own for every version that had it   (listed -> dead)
- a delete takes the rows of a version away                                              (listed -> dead)
- a gc takes away uploads that were begun an hour ago, as their process was killed       (written -> dead)

Nothing leads from dead to another state: a put lists only what it finds listed in the same transaction, or what it
wrote itself under an upload that is still there; and no put writes under an id that was taken before.

A gc looks first which copies the place of the files holds, and asks the catalog after that. A copy it saw was written
by then, as its upload was added before it. So what the catalog neither lists nor has an upload of is dead, now and for
ever, and may be removed at any later time: while a put of the same content is acknowledged, long after the gc was
killed, or twice. The request that removes it names a copy that no version lists then. The same holds for a late write:
it brings a dead copy back, which the next gc removes.

A put whose upload a gc took away begins again with a new id, as it does when the copy that it meant to list was
deleted meanwhile. The hour is of the catalog's clock. A clock that jumps costs a second upload and nothing else.

No file is written, read or removed while a transaction that writes is open: a place that does not answer holds up
nobody else. Nothing here may forget a committed row: after a catalog was brought back from a copy, `turret verify` says
which files a gc took since.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection, delete, func, insert, select, update

from turret.database import Database, files, uploads
from turret.errors import Corrupt, TurretError
from turret.store.blobs import Blob, Files

ABANDONED = timedelta(hours=1)  # without a file begun


class Upload:
    """One attempt of a put: writes what is not listed yet, and says in the transaction that lists it what to list."""

    def __init__(self, database: Database, place: Files) -> None:
        self._database, self._place = database, place
        self._id = ""
        self._written: dict[str, Blob] = {}
        self._damaged: dict[str, str] = {}  # digest -> the upload whose copy is not what it should be

    def write(self, sources: Mapping[Blob, Path]) -> None:
        """Write those contents that no version lists, or whose copy is damaged."""
        with self._database.reading() as connection:
            there = listed(connection, (blob.digest for blob in sources))
        lacking = [blob for blob in sources if not self._whole(there.get(blob.digest))]
        for blob in lacking:
            self._renew()
            copy = replace(blob, upload=self._id)
            try:
                self._place.put(sources[blob], copy)
            except BaseException:
                with suppress(TurretError):  # a gc an hour from now does it too
                    self._forget()
                raise
            self._written[blob.digest] = copy

    def settle(self, connection: Connection, wanted: Iterable[Blob]) -> dict[str, Blob] | None:
        """Digest -> the copy to list, in the transaction that lists it; None where another attempt is needed."""
        ours = bool(self._id) and connection.execute(delete(uploads).where(uploads.c.id == self._id)).rowcount == 1
        found = listed(connection, (blob.digest for blob in wanted))
        for digest, copy in self._written.items():
            there = found.get(digest)
            if ours and (there is None or there.upload == self._damaged.get(digest)):
                connection.execute(update(files).where(files.c.digest == digest).values(upload=copy.upload))
                found[digest] = copy
        still = all(found[digest].upload != upload for digest, upload in self._damaged.items() if digest in found)
        return found if still and all(blob.digest in found for blob in wanted) else None

    def _whole(self, copy: Blob | None) -> bool:
        if copy is None:
            return False
        try:
            self._place.check(copy)
        except Corrupt:
            self._damaged[copy.digest] = copy.upload
            return False
        return True

    def _renew(self) -> None:
        with self._database.writing() as connection:
            now = _text(_now(connection))
            if self._id:
                connection.execute(update(uploads).where(uploads.c.id == self._id).values(since=now))
            else:
                self._id = uuid.uuid4().hex
                connection.execute(insert(uploads).values(id=self._id, since=now))

    def _forget(self) -> None:
        with self._database.writing() as connection:
            connection.execute(delete(uploads).where(uploads.c.id == self._id))


def listed(connection: Connection, digests: Iterable[str]) -> dict[str, Blob]:
    """Digest -> the copy that versions have, of those that any has."""
    query = select(files.c.digest, files.c.bytes, files.c.upload).where(files.c.digest.in_(list(digests))).distinct()
    return {row.digest: Blob(row.digest, row.bytes, row.upload) for row in connection.execute(query)}


def abandoned(connection: Connection) -> list[str]:
    """The uploads whose process was killed, or takes more than an hour for a file."""
    oldest = _text(_now(connection) - ABANDONED)
    return list(connection.execute(select(uploads.c.id).where(uploads.c.since < oldest)).scalars())


def forget_abandoned(database: Database) -> bool:
    """Take them away, so that what they wrote is dead; returns whether there was any."""
    with database.writing() as connection:
        those = abandoned(connection)
        if those:
            connection.execute(delete(uploads).where(uploads.c.id.in_(those)))
    return bool(those)


def dead(
    connection: Connection, there: Iterable[tuple[str, Blob]], *, without: Iterable[str] = ()
) -> Sequence[tuple[str, Blob]]:
    """Which copies, seen before this transaction began, are dead; or would be, were the uploads `without` gone."""
    living = set(connection.execute(select(uploads.c.id)).scalars()) - set(without)
    used = {(row.digest, row.upload) for row in connection.execute(select(files.c.digest, files.c.upload).distinct())}
    return [(name, b) for name, b in there if b.upload not in living and (b.digest, b.upload) not in used]


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _now(connection: Connection) -> datetime:
    """The catalog's clock, which is one for all machines."""
    said = connection.execute(select(func.current_timestamp())).scalar_one()
    return said.replace(tzinfo=UTC) if said.tzinfo is None else said.astimezone(UTC)
