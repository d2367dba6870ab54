"""Which catalog a place of files belongs to: its gc takes what it does not list. Refuses to know versions.

A catalog has an id, and `catalog` beside `blobs/` holds it from the first put on. A folder store needs none: its files
are in the folder of its database.
"""

from __future__ import annotations

from turret.database import Database
from turret.errors import StoreError
from turret.location import Location
from turret.store.blobs import OWNER, Files


def own(location: Location, database: Database, files: Files, *, writes: bool) -> None:
    """Mark the files as this catalog's; raises StoreError where they are another's, whose files a gc would take."""
    if writes and not database.writable():
        raise StoreError(f"store {location} is read-only for this user: grant INSERT, or connect as another user")
    mine, there = database.identity(), files.owner()
    if mine is None:
        raise StoreError(
            f"store {location}: its catalog has lost its id, the comment on the table alembic_version that a dump has: "
            f"set it to what {location.files}/{OWNER} holds"
        )
    if there is None:
        files.claim(mine)
        there = files.owner()
    if there != mine:
        raise StoreError(
            f"store {location}: {location.files} holds the files of another catalog ({there}, this is {mine}): "
            f"give each its own; if that catalog is gone, delete {location.files}/{OWNER} first"
        )
