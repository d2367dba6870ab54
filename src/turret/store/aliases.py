"""Where movable names point, and how they got there, as rows. Refuses to know files.

An alias moves by `promote` and `rollback`; every move is a row of its history, which is only added to:

- each row knows the move before it that a rollback goes back to (`before`); for a promote that is the move in force
- a rollback adds a row that names what that earlier move named and takes over *its* `before`: repeated rollbacks walk
  further back, and a promote after them starts a new line from where they ended
- versions deleted since, and moves to what the alias names already, are passed over
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from turret.database import adapters, alias_history, aliases, versions
from turret.errors import NotFound
from turret.store import catalog
from turret.store.catalog import Version, now, who
from turret.store.golden import GoldenReplay

Verb = Literal["promote", "rollback", "delete"]


@dataclass(frozen=True)
class Move:
    """Where an alias points, and where it pointed before."""

    name: str
    alias: str
    version: str  # "sentiment@3": what it names now
    before: str | None  # what it named until now
    changed: bool  # False: it named that version already, and nothing was written
    skipped: tuple[str, ...] = ()  # versions deleted since, which a rollback passed over
    replays: tuple[GoldenReplay, ...] = ()  # how it did on the golden examples that a promote asked for

    def as_json(self) -> dict[str, Any]:
        replays = [each.as_json() for each in self.replays]
        return {**asdict(self), "skipped": list(self.skipped), "replays": replays}


def promote(connection: Connection, version: Version, alias: str) -> Move:
    """Move the alias to the version."""
    adapter_id, version_id = catalog.adapter_of(connection, version.name), catalog.row_of(connection, version)
    before = catalog.pointed_at(connection, adapter_id, alias)
    named = None if before is None else f"{version.name}@{_number(connection, before)}"
    if before == version_id:
        return Move(version.name, alias, str(version), named, changed=False)
    last = _in_force(connection, adapter_id, alias)
    _move(connection, adapter_id, alias, "promote", version_id, version.number, None if last is None else last.id)
    return Move(version.name, alias, str(version), named, changed=True)


def rollback(connection: Connection, name: str, alias: str) -> Move:
    """Move the alias to what it named before; raises NotFound where it named nothing."""
    adapter_id = catalog.adapter_of(connection, name)
    points = catalog.pointed_at(connection, adapter_id, alias)
    earlier, skipped = _earlier(connection, name, alias)
    _move(connection, adapter_id, alias, "rollback", earlier.version_id, earlier.number, earlier.before)
    named = None if points is None else f"{name}@{_number(connection, points)}"
    return Move(name, alias, f"{name}@{earlier.number}", named, changed=True, skipped=skipped)


def back_from(connection: Connection, name: str, alias: str) -> int:
    """The number of the version that a rollback moves the alias to now; raises NotFound where there is none."""
    return int(_earlier(connection, name, alias)[0].number)


def _earlier(connection: Connection, name: str, alias: str) -> tuple[Row[Any], tuple[str, ...]]:
    """The move that a rollback goes back to, and the versions between that were deleted since."""
    adapter_id = catalog.adapter_of(connection, name)
    last, points = _in_force(connection, adapter_id, alias), catalog.pointed_at(connection, adapter_id, alias)
    if last is None:
        raise NotFound(f"no {name}@{alias} to roll back: {name} has {catalog.there(connection, adapter_id)}")
    skipped: list[str] = []
    earlier = last
    while earlier.before is not None:
        earlier = _history(connection, earlier.before)
        if earlier.version_id is None:
            skipped += [f"{name}@{earlier.number}"] if earlier.number is not None else []
        elif earlier.version_id != points:
            return earlier, tuple(skipped)
    where = "is taken away" if points is None else f"names {name}@{_number(connection, points)}"
    gone = f" but what was deleted since ({', '.join(skipped)})" if skipped else ""
    raise NotFound(
        f"nothing to roll back to: {name}@{alias} {where} and named nothing before{gone}: "
        f"move it with `turret promote {name}@NUMBER {alias}`"
    )


def back_to(connection: Connection, version: Version, alias: str, leaving: Sequence[str]) -> Move | None:
    """Move the alias back to this version, where it names nothing or one of `leaving`; None where it stays.

    Where the alias named the version before, it goes on from there, as after rollbacks; else from where it is.
    """
    adapter_id, version_id = catalog.adapter_of(connection, version.name), catalog.row_of(connection, version)
    points = catalog.pointed_at(connection, adapter_id, alias)
    named = None if points is None else f"{version.name}@{_number(connection, points)}"
    if points == version_id:
        return Move(version.name, alias, str(version), named, changed=False)
    if named is not None and named not in leaving:
        return None
    earlier = last = _in_force(connection, adapter_id, alias)
    while earlier is not None and earlier.version_id != version_id:
        earlier = None if earlier.before is None else _history(connection, earlier.before)
    before = earlier.before if earlier is not None else None if last is None else last.before
    _move(connection, adapter_id, alias, "rollback", version_id, version.number, before)
    return Move(version.name, alias, str(version), named, changed=True)


def forget(connection: Connection, version_id: int) -> None:
    """Take away every alias that names the version, and leave its number alone in the history."""
    pointing = connection.execute(select(aliases).where(aliases.c.version_id == version_id)).all()
    for row in pointing:
        last = _in_force(connection, row.adapter_id, row.alias)
        _move(connection, row.adapter_id, row.alias, "delete", None, None, None if last is None else last.id)
    named = alias_history.c.version_id == version_id
    connection.execute(update(alias_history).where(named).values(version_id=None))


def moves(connection: Connection, name: str) -> list[dict[str, Any]]:
    """Every move of the name's aliases, oldest first; `version` is a number, or null where the alias was taken away."""
    query = (
        select(alias_history)
        .join(adapters, alias_history.c.adapter_id == adapters.c.id)
        .where(adapters.c.name == name)
        .order_by(alias_history.c.id)
    )
    return [
        {
            "alias": row.alias,
            "verb": row.verb,
            "version": row.number,
            "deleted": row.number is not None and row.version_id is None,
            "moved": row.moved,
            "who": row.who,
        }
        for row in connection.execute(query)
    ]


@dataclass(frozen=True)
class Pointing:
    """Where an alias points now."""

    name: str
    alias: str
    number: int
    digest: str
    base: str | None  # the fingerprint of the version's base
    moved: str


def last_move(connection: Connection) -> int:
    """The number of the newest move in the whole store: while it stays, no alias has moved."""
    return int(connection.execute(select(func.max(alias_history.c.id))).scalar() or 0)


def pointing(connection: Connection) -> list[Pointing]:
    """Every alias of every name."""
    base = versions.c.manifest[("base", "fingerprint")].as_string()
    query = (
        select(adapters.c.name, aliases.c.alias, versions.c.number, versions.c.digest)
        .add_columns(base.label("base"), aliases.c.moved)
        .join(adapters, aliases.c.adapter_id == adapters.c.id)
        .join(versions, aliases.c.version_id == versions.c.id)
        .order_by(adapters.c.name, aliases.c.alias)
    )
    return [Pointing(**row._mapping) for row in connection.execute(query)]


def dangling(connection: Connection) -> list[str]:
    """`name@alias` of every alias whose version is not listed; the database refuses to write such a row."""
    query = (
        select(adapters.c.name, aliases.c.alias)
        .join(adapters, aliases.c.adapter_id == adapters.c.id, isouter=True)
        .join(
            versions,
            (aliases.c.version_id == versions.c.id) & (aliases.c.adapter_id == versions.c.adapter_id),
            isouter=True,
        )
        .where(versions.c.id.is_(None))
    )
    return [f"{row.name}@{row.alias}" for row in connection.execute(query)]


def _move(
    connection: Connection,
    adapter_id: int,
    alias: str,
    verb: Verb,
    version_id: int | None,
    number: int | None,
    before: int | None,
) -> None:
    at = now()
    key = {"adapter_id": adapter_id, "alias": alias}
    this = (aliases.c.adapter_id == adapter_id) & (aliases.c.alias == alias)
    connection.execute(delete(aliases).where(this))
    if version_id is not None:
        connection.execute(insert(aliases).values(**key, version_id=version_id, moved=at))
    row = {**key, "version_id": version_id, "number": number, "moved": at, "verb": verb, "before": before, "who": who()}
    connection.execute(insert(alias_history).values(row))


def _in_force(connection: Connection, adapter_id: int, alias: str) -> Row[Any] | None:
    this = (alias_history.c.adapter_id == adapter_id) & (alias_history.c.alias == alias)
    return connection.execute(select(alias_history).where(this).order_by(alias_history.c.id.desc()).limit(1)).first()


def _history(connection: Connection, row: int) -> Row[Any]:
    return connection.execute(select(alias_history).where(alias_history.c.id == row)).one()


def _number(connection: Connection, version_id: int) -> int:
    return int(connection.execute(select(versions.c.number).where(versions.c.id == version_id)).scalar_one())
