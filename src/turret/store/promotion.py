"""Move aliases past their gates and back, and change the gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import Connection

from turret import audit
from turret.database import Database
from turret.errors import Corrupt
from turret.reference import Reference, check_alias
from turret.store import aliases, catalog, gates, golden
from turret.store.aliases import Move
from turret.store.blobs import Blob, Files
from turret.store.catalog import Version, now, who
from turret.store.gates import Gate
from turret.store.golden import Golden, GoldenSet

Also = Callable[[Connection], None] | None  # further writes in the transaction that moves an alias


def promote(connection: Connection, version: Version, alias: str, required: Iterable[Gate], also: Also) -> Move:
    """Move an alias to a version that passes its gates, its golden examples and the gates `required`.

    Raises:
        GateFailed: a gate does not pass.
        ReplayNeeded: golden examples were not yet replayed on the version.
    """
    gates.check(version, alias, [*gates.of(connection, version.name, alias), *required])
    replays = golden.check(connection, version, alias)
    if also is not None:
        also(connection)
    return replace(aliases.promote(connection, version, alias), replays=replays)


def rollback(database: Database, blobs: Files, name: str, alias: str) -> Move:
    """Move an alias back to the version it named before; raises Corrupt if a file of that is damaged."""
    while True:  # until no other process moves the alias while this one checks the files
        with database.writing() as connection:  # fails first if the store is read-only
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
    """Move an alias back to a version if it names one of `leaving` or nothing; None if it stays."""
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


def change_gates(
    connection: Connection,
    name: str,
    alias: str,
    add: Iterable[Gate],
    remove: Iterable[str],
    examples: GoldenSet | None,
    share: float,
) -> Sequence[Gate | Golden]:
    """Remove gates and golden examples from an alias, then add gates and examples. Returns those of the alias."""
    before = gates.gates_of(connection, name, alias)
    for text in remove:
        remove_gate = golden.remove if text.strip().startswith(golden.WORD) else gates.remove
        remove_gate(connection, name, alias, text)
    for gate in add:
        gates.add(connection, name, gate)
    if examples is not None:
        golden.add(connection, name, alias, examples, share)
    after = gates.gates_of(connection, name, alias)
    was, now_is = ({"gates": [*map(str, each)]} for each in (before, after))
    audit.record(connection, "gate", f"{name}@{alias}", name, before=was, after=now_is, at=now(), who=who())
    return after


def _damage(blobs: Files, version: Version, content: Mapping[str, Blob]) -> str | None:
    """A quick check of the files, because a rollback must be quick; loading the version hashes them."""
    for path, blob in content.items():
        if problem := blobs.glance(blob):
            return f"{version} is damaged, {path} {problem}"
    return None
