"""Rows of aliases and of their history: promote, rollback and delete.

Every move of an alias is a row of its history, which is append-only:

- `before` of a row is the move that a rollback from here returns to; for a promote it is the latest move before it
- a rollback adds a row with the version of that earlier move, and with the `before` of that move. So repeated
  rollbacks go further back, and a promote after them continues from where they ended
- a rollback skips versions that were deleted since, and moves to the version that the alias names already
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypedDict

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from turret import audit
from turret.database import access_of, adapters, alias_history, aliases, seen_adapters, seen_versions, versions
from turret.errors import InUse, NotFound
from turret.json_types import JsonObject
from turret.reference import Reference
from turret.store import catalog, panels
from turret.store.catalog import PRODUCTION, Deleted, Version, now, who
from turret.store.golden import GoldenReplay

Verb = Literal["promote", "rollback", "delete"]
_Past = Row[tuple[int, int | None, int | None, int | None]]  # of the history: id, version_id, number and before
_PAST = select(*(alias_history.c[name] for name in ("id", "version_id", "number", "before")))


@dataclass(frozen=True)
class Move:
    """A move of an alias: the version it names now, and the one before."""

    name: str
    alias: str
    version: str  # "sentiment@3": the version it names now
    before: str | None  # the version it named before the move
    changed: bool  # False: it already named that version, and nothing was written
    skipped: tuple[str, ...] = ()  # deleted versions that a rollback skipped
    replays: tuple[GoldenReplay, ...] = ()  # results of the golden examples of the alias

    def as_json(self) -> JsonObject:
        replays = [each.as_json() for each in self.replays]
        return {**asdict(self), "skipped": list(self.skipped), "replays": replays}


def move_alias(connection: Connection, version: Version, alias: str) -> Move:
    """Move an alias to a version."""
    adapter_id, version_id = catalog.adapter_of(connection, version.name), catalog.row_of(connection, version)
    current = catalog.pointed_at(connection, adapter_id, alias)
    before = _seen_reference(connection, version.name, current)
    if current == version_id:
        return Move(version.name, alias, str(version), before, changed=False)
    last = _latest(connection, adapter_id, alias)
    _move(connection, adapter_id, alias, "promote", version_id, version.number, None if last is None else last.id)
    return Move(version.name, alias, str(version), before, changed=True)


def rollback(connection: Connection, name: str, alias: str) -> Move:
    """Move an alias back to the version it named before; raises NotFound if there is none."""
    adapter_id = catalog.adapter_of(connection, name)
    before = _seen_reference(connection, name, catalog.pointed_at(connection, adapter_id, alias))
    target, skipped = _rollback_target(connection, name, alias)
    _move(connection, adapter_id, alias, "rollback", target.version_id, target.number, target.before)
    return Move(name, alias, f"{name}@{target.number}", before, changed=True, skipped=skipped)


def back_from(connection: Connection, name: str, alias: str) -> int:
    """The number of the version that a rollback would move the alias to; raises NotFound if there is none."""
    return int(_rollback_target(connection, name, alias)[0].number)  # only a move to a version is a target


def _rollback_target(connection: Connection, name: str, alias: str) -> tuple[_Past, tuple[str, ...]]:
    """The move that a rollback returns to, past unseen versions, and those in between that were deleted since."""
    adapter_id = catalog.adapter_of(connection, name)
    last, current = _latest(connection, adapter_id, alias), catalog.pointed_at(connection, adapter_id, alias)
    skipped: list[str] = []
    earlier = last
    while earlier is not None and earlier.before is not None:
        earlier = _past(connection, earlier.before)
        if earlier.version_id is None:
            skipped += [f"{name}@{earlier.number}"] if earlier.number is not None else []
        elif earlier.version_id != current and _seen_reference(connection, name, earlier.version_id) is not None:
            return earlier, tuple(skipped)
    named = _seen_reference(connection, name, current)
    if named is None and not skipped:
        raise NotFound(f"no {name}@{alias} to roll back: {name} has {catalog.summary(connection, adapter_id)}")
    where = "was removed" if named is None else f"names {named}"
    gone = f" but versions deleted since ({', '.join(skipped)})" if skipped else ""
    raise NotFound(
        f"nothing to roll back to: {name}@{alias} {where} and named nothing before{gone}: "
        f"move it with `turret promote {name}@NUMBER {alias}`"
    )


def back_to(connection: Connection, version: Version, alias: str, leaving: Sequence[str]) -> Move | None:
    """Move an alias back to a version if it names one of `leaving` or nothing; None if it names another one and stays.

    If the alias named the version before, its history continues from there, as after rollbacks; otherwise from its
    latest move.
    """
    adapter_id, version_id = catalog.adapter_of(connection, version.name), catalog.row_of(connection, version)
    current = catalog.pointed_at(connection, adapter_id, alias)
    before = _version_reference(connection, version.name, current)
    if current == version_id:
        return Move(version.name, alias, str(version), before, changed=False)
    if before is not None and before not in leaving:
        return None
    earlier = last = _latest(connection, adapter_id, alias)
    while earlier is not None and earlier.version_id != version_id:
        earlier = None if earlier.before is None else _past(connection, earlier.before)
    continued = None if (found := earlier or last) is None else found.before
    _move(connection, adapter_id, alias, "rollback", version_id, version.number, continued)
    return Move(version.name, alias, str(version), before, changed=True)


def delete_version(connection: Connection, reference: Reference, *, force: bool) -> Deleted:
    """Remove a version, and its aliases with `force`. Raises InUse."""
    version = catalog.find(connection, reference)
    if catalog.in_experiment(connection, version):
        raise InUse(f"{version} is not deleted: an experiment runs with it; `turret experiment stop {version.name}`")
    children, asking = catalog.children(connection, version), panels.panels_naming(connection, version)
    if not force and (version.aliases or children or asking):
        uses = [f"{version.name}@{alias} names it" for alias in version.aliases]
        uses += [f"{child} was made from it" for child in children]
        uses += [f"panel {panel} asks it" for panel in asking]
        raise InUse(f"{version} is not deleted: {', '.join(uses)}: promote another version first, or --force")
    version_id = catalog.row_of(connection, version)
    for row in connection.execute(select(aliases).where(aliases.c.version_id == version_id)).all():
        last = _latest(connection, row.adapter_id, row.alias)
        _move(connection, row.adapter_id, row.alias, "delete", None, None, None if last is None else last.id)
    named = alias_history.c.version_id == version_id
    connection.execute(update(alias_history).where(named).values(version_id=None))  # the number of the version stays
    return catalog.remove(connection, version)


class MoveRow(TypedDict):
    """A move of an alias. version: its number; None if the alias was removed."""

    alias: str
    verb: str | None
    version: int | None
    deleted: bool
    moved: str
    who: str | None


def moves(connection: Connection, name: str) -> list[MoveRow]:
    """All moves of the aliases of a name, oldest first; `version` is a number, or null if the alias was removed."""
    query = (
        select(alias_history)
        .join(adapters, alias_history.c.adapter_id == adapters.c.id)
        .where(adapters.c.name == name, seen_adapters(connection))
        .order_by(alias_history.c.id)
    )
    if not access_of(connection).whole:
        seen = select(versions.c.id).where(seen_versions(connection))
        query = query.where(alias_history.c.version_id.is_(None) | alias_history.c.version_id.in_(seen))
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
    """The version that an alias names now."""

    name: str
    alias: str
    number: int
    digest: str
    base: str | None  # the fingerprint of its base
    moved: str


def last_move(connection: Connection) -> int:
    """The number of the newest move in the store. While it is the same, no alias has moved."""
    return int(connection.execute(select(func.max(alias_history.c.id))).scalar() or 0)


def aliases_pointing_to(connection: Connection) -> list[Pointing]:
    """All aliases of all names that may be seen."""
    base = versions.c.manifest[("base", "fingerprint")].as_string()
    query = (
        select(adapters.c.name, aliases.c.alias, versions.c.number, versions.c.digest)
        .add_columns(base.label("base"), aliases.c.moved)
        .join(adapters, aliases.c.adapter_id == adapters.c.id)
        .join(versions, aliases.c.version_id == versions.c.id)
        .where(seen_adapters(connection), seen_versions(connection))
        .order_by(adapters.c.name, aliases.c.alias)
    )
    return [Pointing(**row._mapping) for row in connection.execute(query)]


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
    held = select(versions.c.number).join(aliases, aliases.c.version_id == versions.c.id).where(this)
    name = connection.execute(select(adapters.c.name).where(adapters.c.id == adapter_id)).scalar_one()
    former, now_named = {"version": connection.execute(held).scalar()}, {"version": number}
    audit.record(connection, verb, f"{name}@{alias}", name, before=former, after=now_named, at=at, who=who())
    connection.execute(delete(aliases).where(this))
    if version_id is not None:
        connection.execute(insert(aliases).values(**key, version_id=version_id, moved=at))
        if alias == PRODUCTION:
            catalog.make_own(connection, version_id)
    row = {**key, "version_id": version_id, "number": number, "moved": at, "verb": verb, "before": before, "who": who()}
    connection.execute(insert(alias_history).values(row))


def _latest(connection: Connection, adapter_id: int, alias: str) -> _Past | None:
    this = (alias_history.c.adapter_id == adapter_id) & (alias_history.c.alias == alias)
    return connection.execute(_PAST.where(this).order_by(alias_history.c.id.desc()).limit(1)).first()


def _past(connection: Connection, row: int) -> _Past:
    return connection.execute(_PAST.where(alias_history.c.id == row)).one()


def _seen_reference(connection: Connection, name: str, version_id: int | None) -> str | None:
    """As `_version_reference`; None for a version that may not be seen."""
    query = select(versions.c.number).where(versions.c.id == version_id, seen_versions(connection))
    number = connection.execute(query).scalar()
    return None if number is None else f"{name}@{number}"


def _version_reference(connection: Connection, name: str, version_id: int | None) -> str | None:
    """`name@number` of a version by its row id."""
    if version_id is None:
        return None
    number = connection.execute(select(versions.c.number).where(versions.c.id == version_id)).scalar_one()
    return f"{name}@{number}"
