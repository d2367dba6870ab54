"""Changes that no command makes: read, damage or remove a stored file, or change a row."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from turret.store import Store
from turret.store.blobs import Blob, Blobs


def copy(store: Store, reference: str, name: str) -> Blob:
    """The stored copy of a file of a version."""
    return store._look_up(reference)[1][name]


def read(store: Store, reference: str, name: str) -> bytes:
    """The stored bytes of a file of a version."""
    files, blob = store._blobs, copy(store, reference, name)
    if isinstance(files, Blobs):
        return files.path(blob).read_bytes()
    with files._system() as system:
        return system.cat_file(files._key(blob))


def write(store: Store, reference: str, name: str, content: bytes) -> None:
    """Replace the stored bytes."""
    files, blob = store._blobs, copy(store, reference, name)
    if isinstance(files, Blobs):
        files.path(blob).chmod(0o644)
        files.path(blob).write_bytes(content)
    else:
        with files._system() as system:
            system.pipe_file(files._key(blob), content)


def remove(store: Store, reference: str, name: str) -> None:
    """Remove the stored bytes."""
    files, blob = store._blobs, copy(store, reference, name)
    if isinstance(files, Blobs):
        files.path(blob).unlink()
    else:
        with files._system() as system:
            system.rm_file(files._key(blob))


def forget_uploads(store: Store) -> None:
    """Pretend that every running put started its last file long ago."""
    execute(store, "UPDATE uploads SET since = '2000-01-01T00:00:00+00:00'")


def everything(store: Store) -> dict[str, bytes]:
    """All stored files of bundles and runs."""
    found = {
        path.relative_to(store.root).as_posix(): path.read_bytes() for path in store.root.rglob("*/*") if path.is_file()
    }
    files = store._blobs
    if not isinstance(files, Blobs):
        with files._system() as system:
            found |= {name: system.cat_file(f"{files._prefix}/{name}") for name, _ in files.walk()}
    return found


@contextmanager
def catalog(store: Store) -> Iterator[Any]:
    """A writing transaction of the database, without checks of foreign keys."""
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
    """Execute a statement; `?` stands for a value."""
    with catalog(store) as connection:
        if store.location.catalog is None:
            connection.execute(statement, values)
        else:
            connection.execute(statement.replace("?", "%s"), values or None)


def age(path: object, seconds: float = 7200) -> None:
    """Set the time of last change to long ago."""
    os.utime(str(path), (time.time() - seconds,) * 2)
