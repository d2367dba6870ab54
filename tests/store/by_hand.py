"""What no verb does: look at a stored file, damage it, take it away, change a row."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from turret.store import Store
from turret.store import catalog as catalogue
from turret.store.blobs import Blob, Blobs


def copy(store: Store, reference: str, name: str) -> Blob:
    """Which copy a version has of a file."""
    return store._look_up(reference)[1][name]


def read(store: Store, reference: str, name: str) -> bytes:
    """The bytes of a version's file as they are kept."""
    files, blob = store._blobs, copy(store, reference, name)
    if isinstance(files, Blobs):
        return files.path(blob).read_bytes()
    with files._told() as system:
        return system.cat_file(files._key(blob))


def write(store: Store, reference: str, name: str, content: bytes) -> None:
    """Put other bytes in their place."""
    files, blob = store._blobs, copy(store, reference, name)
    if isinstance(files, Blobs):
        files.path(blob).chmod(0o644)
        files.path(blob).write_bytes(content)
    else:
        with files._told() as system:
            system.pipe_file(files._key(blob), content)


def remove(store: Store, reference: str, name: str) -> None:
    """Take them away."""
    files, blob = store._blobs, copy(store, reference, name)
    if isinstance(files, Blobs):
        files.path(blob).unlink()
    else:
        with files._told() as system:
            system.rm_file(files._key(blob))


def as_format_five(store: Store) -> None:
    """Give every listed file the name that it had before copies had uploads; the catalog is changed by the caller."""
    files = store._blobs
    with store.database().reading() as connection:
        blobs = {blob.digest: blob for _, _, blob in catalogue.contents(connection) if blob.upload}
    for blob in blobs.values():
        before = replace(blob, upload="")
        if isinstance(files, Blobs):
            files.path(blob).rename(files.path(before))
        else:
            with files._told() as system:
                system.mv(files._key(blob), files._key(before))


def forget_uploads(store: Store) -> None:
    """As if every put that is at work had begun its last file long ago."""
    execute(store, "UPDATE uploads SET since = '2000-01-01T00:00:00+00:00'")


def everything(store: Store) -> dict[str, bytes]:
    """Every kept file of the bundles and of the runs."""
    found = {
        path.relative_to(store.root).as_posix(): path.read_bytes() for path in store.root.rglob("*/*") if path.is_file()
    }
    files = store._blobs
    if not isinstance(files, Blobs):
        with files._told() as system:
            found |= {name: system.cat_file(f"{files._prefix}/{name}") for name, _ in files.walk()}
    return found


@contextmanager
def catalog(store: Store) -> Iterator[Any]:
    """A transaction of the database itself that writes, without a look at foreign keys."""
    if store.location.catalog is not None:
        import psycopg

        with psycopg.connect(store.location.catalog) as server:
            server.execute("SET session_replication_role = replica")
            yield server
        return
    connection = sqlite3.connect(store.root / "turret.db", isolation_level=None)
    with closing(connection):
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")


def execute(store: Store, statement: str, *values: object) -> None:
    """Change rows; `?` in the statement stands for a value."""
    with catalog(store) as connection:
        if store.location.catalog is None:
            connection.execute(statement, values)
        else:
            connection.execute(statement.replace("?", "%s"), values or None)


def age(path: object, seconds: float = 7200) -> None:
    """Make it as if it had last changed that long ago."""
    os.utime(str(path), (time.time() - seconds,) * 2)
