"""Promotion: how an alias moves past its gates and back, and how its gates change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import Connection

from turret.database import Database
from turret.errors import Corrupt
from turret.reference import Reference, check_alias
from turret.store import aliases, catalog, gates, golden
from turret.store.aliases import Move
from turret.store.blobs import Blob, Files
from turret.store.catalog import Version
from turret.store.gates import Gate
from turret.store.golden import Golden

Also = Callable[[Connection], None] | None  # written in the transaction that moves an alias, or not at all


def promote(connection: Connection, version: Version, alias: str, wanted: Iterable[Gate], also: Also) -> Move:
    """Move an alias to a version that passes the alias's gates, its golden examples and the gates `wanted`."""
    gates.check(version, alias, [*gates.of(connection, version.name, alias), *wanted])
    replays = golden.check(connection, version, alias)
    if also is not None:
        also(connection)
    return replace(aliases.promote(connection, version, alias), replays=replays)


def rollback(database: Database, blobs: Files, name: str, alias: str) -> Move:
    """Move an alias back to what it named before; raises Corrupt where a file of that is missing."""
    while True:  # until no other process moved the alias while this one looked at the files
        with database.writing() as connection:  # says first of all where nothing may be written
            version = catalog.find(connection, Reference(name, version=aliases.back_from(connection, name, alias)))
            content = catalog.content_of(connection, version)
        damage = _damage(blobs, version, content)
        with database.writing() as connection:
            if aliases.back_from(connection, name, alias) != version.number:
                continue
            move = aliases.rollback(connection, name, alias)
            if damage:
                raise Corrupt(f"{name}@{alias} stays at {move.before}: {damage}")
            return move


def back_to(
    database: Database, blobs: Files, exact: Reference, alias: str, leaving: Sequence[str], also: Also
) -> Move | None:
    """Move an alias back to a version, where it names one of `leaving` or nothing; None where it stays."""
    with database.reading() as connection:
        version = catalog.find(connection, exact)
        content = catalog.content_of(connection, version)
    damage = _damage(blobs, version, content)
    with database.writing() as connection:
        if also is not None:
            also(connection)
        move = aliases.back_to(connection, catalog.find(connection, exact), check_alias(alias), leaving)
        if move is not None and damage:
            raise Corrupt(f"{exact.name}@{alias} stays where it is: {damage}")
        return move


def gates_of(connection: Connection, name: str, alias: str | None) -> Sequence[Gate | Golden]:
    """The gates and golden examples of a name's alias, or of all its aliases."""
    return [*gates.of(connection, name, alias), *golden.of(connection, name, alias)]


def change_gates(connection: Connection, name: str, alias: str, add: Iterable[Gate], remove: Iterable[str]) -> None:
    """Take gates and golden examples off an alias, then add gates."""
    for text in remove:
        drop = golden.drop if text.strip().startswith(golden.WORD) else gates.drop
        drop(connection, name, alias, text)
    for gate in add:
        gates.keep(connection, name, gate)


def _damage(blobs: Files, version: Version, content: Mapping[str, Blob]) -> str | None:
    """A look at the files that an alias goes back to, quick as a rollback must be; loading hashes everything."""
    for path, blob in content.items():
        if said := blobs.glance(blob):
            return f"{version} is damaged, {path} {said}"
    return None
