"""What no verb does: look at a stored file, damage it, take it away, change a row."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from turret.store import Store
from turret.store.blobs import Blobs


def read(store: Store, reference: str, name: str) -> bytes:
    """The bytes of a version's file as they are kept."""
    files, digest = store._blobs, store.show(reference)["files"][name]["digest"]
    if isinstance(files, Blobs):
        return files.path(digest).read_bytes()
    with files._told() as system:
        return system.cat_file(files._blob(digest))


def write(store: Store, reference: str, name: str, content: bytes) -> None:
    """Put other bytes in their place."""
    files, digest = store._blobs, store.show(reference)["files"][name]["digest"]
    if isinstance(files, Blobs):
        files.path(digest).chmod(0o644)
        files.path(digest).write_bytes(content)
    else:
        with files._told() as system:
            system.pipe_file(files._blob(digest), content)


def remove(store: Store, reference: str, name: str) -> None:
    """Take them away."""
    files, digest = store._blobs, store.show(reference)["files"][name]["digest"]
    if isinstance(files, Blobs):
        files.path(digest).unlink()
    else:
        with files._told() as system:
            system.rm_file(files._blob(digest))


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
