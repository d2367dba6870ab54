"""The audit log: a row for every control action, in the transaction of the action where it has one.

The table `audit` is append-only: the database refuses to change or remove a row. `what` is what was acted on, such as
`news@production`; `before` and `after` are JSON; `adapter` is its name, NULL for a token. `who` is the user of the
process, or the token of a request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ColumnElement, Connection, String, cast, func, insert, or_, select, true

from turret.database import Database, access_of, adapters, audit, seen_adapters, seen_names, seen_versions, versions
from turret.errors import StoreError
from turret.json_types import AsJson, JsonObject, Plain


@dataclass(frozen=True)
class Action(AsJson):
    """One row of the audit log. id: its number among those that may be seen, so it tells nothing of the others."""

    id: int
    tenant: str
    adapter: str | None  # None for an action on a token
    at: str
    who: str | None  # the user, or `token NAME`
    verb: str
    what: str
    before: JsonObject | None
    after: JsonObject | None


def record(
    connection: Connection,
    verb: str,
    what: str,
    adapter: str | None,
    *,
    at: str,
    who: str | None,
    before: Mapping[str, Plain] | None = None,
    after: Mapping[str, Plain] | None = None,
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


def read_actions(
    connection: Connection,
    *,
    since: str | None = None,
    below: int | None = None,
    limit: int = 100,
    who: str | None = None,
    verb: str | None = None,
    what: str | None = None,
) -> Sequence[Action]:
    """The newest actions that may be seen, the newest first.

    Args:
        since: a time or the start of one, such as `2026-11-27`.
        below: only actions with a smaller id.
        who, verb, what: only actions whose field contains this, in upper or lower case.
    """
    number = func.row_number().over(order_by=audit.c.id)
    columns = [number.label("id"), *(column for column in audit.c if column.name != "id")]
    seen = select(*columns).where(audit.c.tenant == access_of(connection).tenant, _seen_actions(connection)).subquery()
    query = select(seen)
    if since is not None:
        query = query.where(seen.c.at >= since)
    if below is not None:
        query = query.where(seen.c.id < below)
    for column, part in ((seen.c.who, who), (seen.c.verb, verb), (seen.c.what, what)):
        if part is not None:
            query = query.where(column.icontains(part, autoescape=True))
    rows = connection.execute(query.order_by(seen.c.id.desc()).limit(limit))
    return [Action(**row._mapping) for row in rows]


def _seen_actions(connection: Connection) -> ColumnElement[bool]:
    """All actions, or for a limited access those on names and versions that it sees, of no panel."""
    if access_of(connection).whole:
        return true()
    reference = adapters.c.name + "@" + cast(versions.c.number, String)
    seen = select(reference).join(adapters, versions.c.adapter_id == adapters.c.id)
    seen = seen.where(seen_adapters(connection), seen_versions(connection))
    return (audit.c.verb != "panel") & or_(audit.c.adapter.in_(seen_names(connection)), audit.c.what.in_(seen))


# --- following --------------------------------------------------------------------------------------------------------
# A server follows what all tenants do by the audit log: one statement at each look, however many tenants there are.


Subject = Literal["aliases", "experiments", "promises", "tokens"]
Mark = tuple[int, int]
LOOK_SECONDS = 0.2  # between two looks of a process
_SUBJECTS: dict[str, Subject] = {  # the first word of a verb -> what the action may change
    "promote": "aliases",
    "rollback": "aliases",
    "delete": "aliases",
    "experiment": "experiments",
    "promise": "promises",
    "token": "tokens",
}


class NewestActions:
    """The newest action of each tenant on each subject. Safe to use from several threads.

    The log is append-only and has one writer at a time, so its ids are in the order of the commits. A look reads the
    last known row again, and what came after it. If that row is another one now, the catalog was restored from a copy,
    and every mark changes.
    """

    def __init__(self, database: Database, clock: Callable[[], float], seconds: float = LOOK_SECONDS) -> None:
        self._database, self._clock, self._seconds = database, clock, seconds
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._problem: StoreError | None = None
        self._last: tuple[int, str] | None = None  # id and time of the newest row
        self._restored = 0  # how often the log did not continue
        self._newest: dict[tuple[Subject, str | None], int] = {}

    def mark(self, subject: Subject, tenant: str | None = None) -> Mark:
        """What differs after any action on the subject, of one tenant or of all. Look before you read the subject.

        Raises:
            StoreError: the catalog cannot be reached. It is asked again after `seconds`.
        """
        with self._lock:
            if self._clock() - self._looked_at >= self._seconds:
                try:
                    self._look()
                    self._problem = None
                except StoreError as error:
                    self._problem = error
                self._looked_at = self._clock()
            if self._problem is not None:
                raise self._problem
            return self._restored, self._newest.get((subject, tenant), 0)

    def _look(self) -> None:
        last, rows = self._last, select(audit.c.id, audit.c.at, audit.c.tenant, audit.c.verb)
        rows = rows.order_by(audit.c.id.desc())
        with self._database.reading() as connection:
            found = [] if last is None else connection.execute(rows.where(audit.c.id >= last[0])).all()
            continues = bool(found) and (found[-1].id, found[-1].at) == last
            if not continues:
                found = connection.execute(rows.limit(1)).all()
        if continues:
            for row in reversed(found[:-1]):
                if subject := _SUBJECTS.get(row.verb.partition(" ")[0]):
                    self._newest[subject, row.tenant] = self._newest[subject, None] = row.id
        elif last is not None or found:
            self._restored += 1
        self._last = (found[0].id, found[0].at) if found else None
