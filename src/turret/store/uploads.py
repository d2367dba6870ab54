"""Which copy of some content the catalog lists, so that puts and gcs can run at once and late requests do no harm.

Each attempt of a put has an id, its upload, and writes its files under names that end with it: `<digest>-<upload>`. No
other attempt has that id. A copy is a digest and an upload. The catalog tells its state:

- written: the table `uploads` has its upload. The put adds that row, and commits, before it writes the first file
- listed: the table `files`, `artifacts` or `client_files` has its digest and upload
- dead: neither. A dead copy stays dead

These are all state changes. Each is a transaction, and writing transactions are serialized:

- a put adds an upload                                                          (nothing -> written)
- a put lists the files it wrote, if its upload still exists, and removes the upload     (written -> listed, or dead)
- a put lists a copy that a version already lists                               (listed -> listed)
- a put that found the listed copy damaged lists its own for all versions that had it    (listed -> dead)
- a delete removes the rows of a version                                        (listed -> dead)
- an artifact gets new content (`turret.store.artifacts`); it lists only copies of its own     (listed -> dead)
- a gc gives up the data of trainings that have ended (`turret.store.queued_data`)            (listed -> dead)
- a gc removes uploads that started an hour ago, since their process was killed  (written -> dead)

No change leads from dead to another state: a put lists only copies that are listed in the same transaction, or copies
that it wrote under an upload that still exists; and no put uses an id again.

A gc first reads which copies exist as files, and then asks the catalog. A copy that it saw was written by then, and its
upload had been added before. If the catalog now has neither, the copy is dead permanently. It may be removed at any
later time, or twice: during a put of the same content, or long after the gc was killed. No version lists the name in
that request. The same holds for a late write: it restores a dead copy, which the next gc removes.

A put whose upload a gc removed starts again with a new id. It does the same if the copy that it meant to list was
deleted in the meantime. The hour is measured by the catalog's clock. If it jumps, a put uploads its files twice.

No file is written, read or removed during a writing transaction, so a place for files that does not answer blocks no
other process. The catalog must not lose a committed row: after it was restored from a copy, `turret verify` lists the
files that a gc has removed since.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, timedelta
from pathlib import Path

from sqlalchemy import Connection, Table, delete, func, insert, select, update

from turret.database import Database, artifacts, client_files, files, uploads
from turret.errors import Corrupt, TurretError
from turret.store.blobs import Blob, Files

ABANDONED = timedelta(hours=1)  # since the last file was started


class Upload:
    """One attempt of a put: it writes the missing files, and decides which copies the put may list."""

    def __init__(self, database: Database, place: Files) -> None:
        self._database, self._place = database, place
        self._id = ""
        self._written: dict[str, Blob] = {}
        self._damaged: dict[str, str] = {}  # digest -> the upload of its damaged copy

    def write(self, sources: Mapping[Blob, Path]) -> None:
        """Write the content that no version lists, or whose listed copy is damaged."""
        with self._database.reading() as connection:
            existing = listed_blobs(connection, (blob.digest for blob in sources))
        missing = [blob for blob in sources if not self._is_whole(existing.get(blob.digest))]
        for blob in missing:
            self._renew()
            copy = replace(blob, upload=self._id)
            write(self._database, self._place, self._id, [(sources[blob], copy)])
            self._written[blob.digest] = copy

    def settle(self, connection: Connection, blobs: Iterable[Blob]) -> dict[str, Blob] | None:
        """Choose the copies to list, in the transaction that lists them.

        Returns:
            Digest -> the copy to list; None if the put must start another attempt.
        """
        ours = bool(self._id) and end(connection, self._id)
        found = listed_blobs(connection, (blob.digest for blob in blobs))
        for digest, copy in self._written.items():
            current = found.get(digest)
            if ours and (current is None or current.upload == self._damaged.get(digest)):
                connection.execute(update(files).where(files.c.digest == digest).values(upload=copy.upload))
                found[digest] = copy
        repaired = all(found[digest].upload != upload for digest, upload in self._damaged.items() if digest in found)
        return found if repaired and all(blob.digest in found for blob in blobs) else None

    def _is_whole(self, copy: Blob | None) -> bool:
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
            if self._id:
                connection.execute(update(uploads).where(uploads.c.id == self._id).values(since=_since(connection)))
            else:
                self._id = begin(connection)


def begin(connection: Connection) -> str:
    """Add an upload, whose copies may be written after this transaction. Returns its id."""
    upload = uuid.uuid4().hex
    connection.execute(insert(uploads).values(id=upload, since=_since(connection)))
    return upload


def write(database: Database, place: Files, upload: str, copies: Iterable[tuple[Path, Blob]]) -> None:
    """Write copies of local files under an upload. If one fails, the upload ends, and all of its copies are dead."""
    with given_up_on_error(database, upload):
        for source, copy in copies:
            place.put(source, copy)


@contextmanager
def given_up_on_error(database: Database, upload: str) -> Iterator[None]:
    """If the block fails, the upload ends, and all of its copies are dead."""
    try:
        yield
    except BaseException:
        with suppress(TurretError), database.writing() as connection:  # otherwise a gc does it after an hour
            end(connection, upload)
        raise


def end(connection: Connection, upload: str) -> bool:
    """Remove an upload. Returns whether it still existed: then its copies may be listed in this transaction."""
    return connection.execute(delete(uploads).where(uploads.c.id == upload)).rowcount == 1


def listed_blobs(connection: Connection, digests: Iterable[str]) -> dict[str, Blob]:
    """Digest -> the copy that versions list, for those that any version lists."""
    query = select(files.c.digest, files.c.bytes, files.c.upload).where(files.c.digest.in_(list(digests))).distinct()
    return {row.digest: Blob(row.digest, row.bytes, row.upload) for row in connection.execute(query)}


def abandoned_uploads(connection: Connection) -> list[str]:
    """Uploads whose process was killed, or needs more than an hour for a file."""
    old = uploads.c.since < _since(connection, ABANDONED)
    return list(connection.execute(select(uploads.c.id).where(old)).scalars())


def forget_abandoned(database: Database) -> bool:
    """Remove abandoned uploads, so that their copies are dead; False if there were none."""
    with database.reading() as connection:
        found = abandoned_uploads(connection)
    if not found and database.writable():  # a disk without a free inode can be read, and not be written
        return False
    with database.writing() as connection:
        ids = abandoned_uploads(connection)
        if ids:
            connection.execute(delete(uploads).where(uploads.c.id.in_(ids)))
    return bool(ids)


def dead_copies(
    connection: Connection, seen: Iterable[tuple[str, Blob]], *, without: Iterable[str] = ()
) -> Sequence[tuple[str, Blob]]:
    """The dead copies among those that were seen before this transaction began.

    Args:
        seen: name and content of each copy.
        without: uploads to treat as removed, for a dry run.
    """
    living = set(connection.execute(select(uploads.c.id)).scalars()) - set(without)
    used = listed_copies(connection, files, client_files, artifacts)
    return [(name, b) for name, b in seen if b.upload not in living and (b.digest, b.upload) not in used]


def listed_copies(connection: Connection, *tables: Table) -> set[tuple[str, str]]:
    """Digest and upload of every copy that these tables list."""
    queries = [select(each.c.digest, each.c.upload).distinct() for each in tables]
    return {(row.digest, row.upload) for query in queries for row in connection.execute(query)}


def _since(connection: Connection, ago: timedelta = timedelta()) -> str:
    """The value of `since` for a file that is started now, or was so long ago: by the clock that all machines share."""
    now = connection.execute(select(func.current_timestamp())).scalar_one()
    moment = now.replace(tzinfo=UTC) if now.tzinfo is None else now.astimezone(UTC)
    return str((moment - ago).isoformat(timespec="seconds"))
