"""Which catalog owns a place of files.

A gc removes what its catalog does not list, so two catalogs must not share a place. A catalog has an id, which the file
`catalog` next to `blobs/` holds from the first put on. A folder store needs none, because its database is in the same
folder.
"""

from __future__ import annotations

from turret.database import Database
from turret.errors import StoreError
from turret.location import Location
from turret.store.blobs import OWNER, Files


def claim(location: Location, database: Database, files: Files, *, writes: bool) -> None:
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
