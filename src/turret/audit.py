"""The audit log: a row for every control action, in the transaction of the action where it has one.

The table `audit` is append-only: the database refuses to change or remove a row. `what` is what was acted on, such as
`news@production`; `before` and `after` are JSON; `adapter` is its name, NULL for a token. `who` is the user of the
process, or the token of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import JSON, Column, ColumnElement, Connection, Integer, String, Table, func, insert, select, true

from turret.database import adapters, bytewise, metadata
from turret.json_types import JsonMapping, JsonObject
from turret.visibility import access_of, seen_adapters

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", bytewise(64), nullable=False, index=True),
    Column("adapter", bytewise(100)),
    Column("at", String(32), nullable=False),
    Column("who", String(100)),
    Column("verb", String(32), nullable=False),
    Column("what", String(200), nullable=False),
    Column("before", JSON),
    Column("after", JSON),
)


@dataclass(frozen=True)
class Action:
    """One row of the audit log. id: its number among those that may be seen, so it tells nothing of the others."""

    id: int
    tenant: str
    adapter: str | None
    at: str
    who: str | None
    verb: str
    what: str
    before: JsonMapping | None
    after: JsonMapping | None

    def as_json(self) -> JsonObject:
        return asdict(self)


def record(
    connection: Connection,
    verb: str,
    what: str,
    adapter: str | None,
    *,
    at: str,
    who: str | None,
    before: JsonMapping | None = None,
    after: JsonMapping | None = None,
    tenant: str | None = None,
) -> None:
    """Add a row for an action.

    Args:
        adapter: the name that it is about; None for a token, a file or a batch.
        tenant: whose action it is; None for the connection's tenant.
    """
    row = {"tenant": tenant or access_of(connection).tenant, "at": at, "who": who, "verb": verb, "what": what[:200]}
    name = None if adapter is None else adapter[:100]
    connection.execute(insert(audit).values(**row, adapter=name, before=before, after=after))


def read(
    connection: Connection, *, since: str | None = None, below: int | None = None, limit: int = 100
) -> Sequence[Action]:
    """The newest actions that may be seen, the newest first.

    Args:
        since: a time or the start of one, such as `2026-11-27`.
        below: only actions with a smaller id.
    """
    number = func.row_number().over(order_by=audit.c.id)
    columns = [number.label("id"), *(column for column in audit.c if column.name != "id")]
    seen = select(*columns).where(audit.c.tenant == access_of(connection).tenant, _seen(connection)).subquery()
    query = select(seen)
    if since is not None:
        query = query.where(seen.c.at >= since)
    if below is not None:
        query = query.where(seen.c.id < below)
    rows = connection.execute(query.order_by(seen.c.id.desc()).limit(limit))
    return [Action(**row._mapping) for row in rows]


def _seen(connection: Connection) -> ColumnElement[bool]:
    """All actions, or for a limited access those on adapters that it sees."""
    if access_of(connection).whole:
        return true()
    return audit.c.adapter.in_(select(adapters.c.name).where(seen_adapters(connection)))
