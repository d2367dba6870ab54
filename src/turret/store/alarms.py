"""Alarms: the rows of the audit log that somebody is told of, and which of them were sent.

An alarm is a row of the audit log. The transaction that changes something writes its row too, so a kill loses no alarm.
`alarms` has a row for each that was delivered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Column, Connection, ForeignKey, String, Table, insert, select

from turret.audit import audit
from turret.database import metadata
from turret.json_types import JsonObject
from turret.store.catalog import now
from turret.timestamp import timestamp

PROMISE_BROKEN, INPUTS_DRIFTED = "promise broken", "promise drift"
ARM_DROPPED, EVIDENCE_VOID = "experiment drop", "experiment void"
KINDS = (PROMISE_BROKEN, INPUTS_DRIFTED, ARM_DROPPED, EVIDENCE_VOID)  # verbs of the audit log
NOTHING = "nothing but this alarm"  # what was done, if nothing else was asked for
KEPT = timedelta(days=1)  # an alarm that could not be sent for so long is not sent any more

alarms = Table(
    "alarms",
    metadata,
    Column("audit_id", ForeignKey(audit.c.id), primary_key=True, autoincrement=False),
    Column("sent", String(32), nullable=False),
)


@dataclass(frozen=True)
class Alarm:
    """What a receiver is told.

    Args:
        id: of the row in the audit log; a receiver that gets it twice knows it by this.
        kind: the verb of that row.
        version: the version with the promise, or of the arm.
        experiment: NAME#NUMBER; None for a promise.
        promise: what was promised, in words; None for an experiment.
        why, did: what happened, and what was done.
    """

    id: int
    kind: str
    tenant: str
    version: str | None
    experiment: str | None
    promise: str | None
    why: str
    did: str
    at: str

    def as_json(self) -> JsonObject:
        return asdict(self)


def unsent(connection: Connection) -> Sequence[Alarm]:
    """The alarms of all tenants in the last day that nobody has sent, the oldest first."""
    query = select(audit).outerjoin(alarms, alarms.c.audit_id == audit.c.id).where(alarms.c.audit_id.is_(None))
    query = query.where(audit.c.verb.in_(KINDS), audit.c.at >= timestamp(datetime.now(UTC) - KEPT))
    found = []
    for row in connection.execute(query.order_by(audit.c.id)):
        said, about = row.after or {}, row.verb.startswith("experiment")
        version, experiment = (said.get("version"), row.what) if about else (row.what, None)
        why, did = str(said.get("why", "")), str(said.get("did", ""))
        found.append(Alarm(row.id, row.verb, row.tenant, version, experiment, said.get("promise"), why, did, row.at))
    return found


def mark_sent(connection: Connection, alarm: Alarm) -> None:
    """Record that an alarm was delivered, unless another server has recorded it."""
    if connection.execute(select(alarms.c.sent).where(alarms.c.audit_id == alarm.id)).first() is None:
        connection.execute(insert(alarms).values(audit_id=alarm.id, sent=now()))
