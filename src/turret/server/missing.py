"""The error for a model that is not here: it lists what the caller may ask on this server's bases."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import select

from turret.database import Database, adapters, versions
from turret.errors import NotFound
from turret.visibility import seen_adapters, seen_versions

MOST = 8  # names in the error


def missing_model(
    database: Database, fingerprints: Collection[str], bases: Sequence[str], model: str, error: NotFound
) -> NotFound:
    """The error for a reference that names nothing.

    Args:
        fingerprints: Of the server's bases.
        bases: The names of those that the caller may ask.
        error: Of the store; kept if the adapter is here, since it then lists its own versions and aliases.
    """
    name = model.partition("@")[0]
    on_base = versions.c.manifest[("base", "fingerprint")].as_string().in_(fingerprints)
    query = select(adapters.c.name).join(versions, versions.c.adapter_id == adapters.c.id).where(on_base).distinct()
    with database.reading() as connection:
        query = query.where(seen_adapters(connection), seen_versions(connection))
        if connection.execute(query.where(adapters.c.name == name).limit(1)).first() is not None:
            return error
        names = connection.execute(query.order_by(adapters.c.name).limit(MOST)).scalars().all()
    known = [*names, *bases]
    which = f"expected one of {', '.join(known)}" if known else "you may ask none"
    where = "this server's base" if len(fingerprints) == 1 else "the bases of this server"
    return NotFound(f"no adapter named {ascii(name)[:60]} on {where}: {which}")
