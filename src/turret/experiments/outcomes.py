"""What came of answers, as rows: each told once, each counted once. Refuses to know what it proves.

An outcome names its answer by receipt, or its unit. Whatever is told gets one clear answer, and never an exception:

| status | when | kept | counted |
| --- | --- | --- | --- |
| counted | the first outcome of its unit | yes | yes |
| noted | its unit counted already, by another answer | yes | no |
| repeated | the same answer was told before | no | no |
| unknown | no answer of an experiment has this receipt, no unit of it this name | no | no |
| late | the experiment has ended, or outcomes do not live that long | no | no |
| refused | the value is no outcome of this metric | no | no |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, exists, func, insert, select

from turret.database import assignments, outcomes
from turret.errors import BadExperiment
from turret.experiments import assign, rows
from turret.experiments.experiment import Experiment, lasting, seconds_between

Status = Literal["counted", "noted", "repeated", "unknown", "late", "refused"]
LONGEST_RECEIPT = 100
AT_ONCE = 500  # values in one question to the database


@dataclass(frozen=True)
class Recorded:
    """What became of an outcome that was told."""

    status: Status
    text: str  # one line for people
    experiment: str | None = None
    arm: str | None = None

    @property
    def kept(self) -> bool:
        return self.status in ("counted", "noted")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """An answer that an experiment gave: what is logged of it."""

    experiment_id: int
    unit: str  # hashed
    arm: str
    revision: int
    probability: float
    at: str
    receipt: str | None = None


def check_receipt(receipt: str) -> str:
    """Raises BadExperiment for what cannot be kept as the id of an answer."""
    if not _is_receipt(receipt):
        raise BadExperiment(f"receipt {ascii(receipt)[:60]}: expected 1 to {LONGEST_RECEIPT} printable characters")
    return receipt


def log(connection: Connection, seen: Sequence[Seen]) -> None:
    """Write answers down, in their order; a receipt that is there already is left as it is."""
    known: dict[int, set[str]] = {}
    receipts = _there(connection, assignments.c.receipt, [each.receipt for each in seen if each.receipt])
    for experiment_id in {each.experiment_id for each in seen}:
        units = [each.unit for each in seen if each.experiment_id == experiment_id]
        mine = assignments.c.experiment_id == experiment_id
        known[experiment_id] = _there(connection, assignments.c.unit, units, mine)
    new = []
    for each in seen:
        if each.receipt is not None and each.receipt in receipts:
            continue
        first = each.unit not in known[each.experiment_id]
        known[each.experiment_id].add(each.unit)
        if each.receipt is not None:
            receipts.add(each.receipt)
        new.append({**asdict(each), "first": int(first)})
    if new:
        connection.execute(insert(assignments), new)


def record(
    connection: Connection,
    value: object,
    at: str,
    *,
    receipt: str | None = None,
    unit: str | None = None,
    experiment: Experiment | None = None,
) -> Recorded:
    """Keep one outcome, by the receipt of its answer or, of `experiment`, by its unit."""
    found = _answer(connection, receipt, unit, experiment)
    if isinstance(found, Recorded):
        return found
    now = rows.by_id(connection, found.experiment_id)
    said = {"experiment": str(now), "arm": found.arm}
    if now.state != rows.RUNNING:
        when = (now.ended or "")[:16].replace("T", " ")
        return Recorded("late", f"{now} ended {when} UTC: this outcome is not counted", **said)
    number = now.metric.read(value)
    if isinstance(number, str):
        return Recorded("refused", f"{number} (the metric of {now} is {now.metric}); nothing is recorded", **said)
    mine = (outcomes.c.experiment_id == now.id) & (outcomes.c.unit == found.unit)
    before = connection.execute(select(outcomes.c.assignment_id, outcomes.c.value).where(mine)).all()
    if same := [row.value for row in before if row.assignment_id == found.id]:
        other = "" if same[0] == number else f", not {number:g}"
        return Recorded("repeated", f"this answer has its outcome, {same[0]:g}, already: it stays{other}", **said)
    if not before and (waited := _too_late(connection, now, found.unit, at)) is not None:
        lives = f"outcomes of {now} count for {lasting(now.outcome_ttl or 0.0)}"
        said_late = f"this {now.unit} was first answered {lasting(waited)} before, and {lives}: not counted"
        return Recorded("late", said_late, **said)
    row = {
        "assignment_id": found.id,
        "experiment_id": now.id,
        "unit": found.unit,
        "arm": found.arm,
        "revision": found.revision,
        "value": number,
        "counted": int(not before),
        "at": at,
    }
    connection.execute(insert(outcomes).values(row))
    if before:
        return Recorded(
            "noted", f"kept, not counted: this {now.unit} has counted in {now}, and a {now.unit} counts once", **said
        )
    return Recorded("counted", f"counted for {found.arm} of {now}", **said)


def counted(connection: Connection, experiment: Experiment, after: int = 0) -> Sequence[Any]:
    """The outcomes that count, in the order in which they came, after that id.

    `id, arm, revision, value, at`, and `first`: when the unit was first answered.
    """
    mine = (outcomes.c.experiment_id == experiment.id) & (outcomes.c.counted == 1) & (outcomes.c.id > after)
    unit = (assignments.c.experiment_id == experiment.id) & (assignments.c.unit == outcomes.c.unit)
    table = outcomes.c
    query = (
        select(table.id, table.arm, table.revision, table.value, table.at, assignments.c.at.label("first"))
        .join(assignments, unit & (assignments.c.first == 1))
        .where(mine)
        .order_by(table.id)
    )
    return connection.execute(query).all()


def units(connection: Connection, experiment: Experiment, after: int = 0) -> Sequence[Any]:
    """`id, arm, revision` of the first answer to each unit, in their order, after that id."""
    table = assignments.c
    query = select(table.id, table.arm, table.revision).where(_first(experiment, after)).order_by(table.id)
    return connection.execute(query).all()


def missing(connection: Connection, experiment: Experiment, after: int, until: str | None) -> tuple[Sequence[Any], int]:
    """`arm, revision, at` of units first answered up to `until` that have no outcome that counts, after that id.

    The second value is the id to go on from. Units are taken in the order of their ids, up to the first younger one.
    """
    if until is None:
        return (), after
    table, new = assignments.c, _first(experiment, after)
    younger = connection.execute(select(func.min(table.id)).where(new & (table.at > until))).scalar()
    old = new if younger is None else new & (table.id < younger)
    last = connection.execute(select(func.max(table.id)).where(old)).scalar()
    if last is None:
        return (), after
    told = (outcomes.c.experiment_id == experiment.id) & (outcomes.c.unit == table.unit) & (outcomes.c.counted == 1)
    query = select(table.arm, table.revision, table.at).where(old & ~exists().where(told)).order_by(table.id)
    return connection.execute(query).all(), last


def _first(experiment: Experiment, after: int) -> ColumnElement[bool]:
    table = assignments.c
    return (table.experiment_id == experiment.id) & (table.first == 1) & (table.id > after)


def _answer(
    connection: Connection, receipt: str | None, unit: str | None, experiment: Experiment | None
) -> Row[Any] | Recorded:
    """The logged answer that is meant."""
    if receipt is not None:
        plausible = select(assignments).where(assignments.c.receipt == receipt)
        row = connection.execute(plausible).first() if _is_receipt(receipt) else None
        if row is None:
            return Recorded(
                "unknown",
                f"no answer of an experiment has receipt {ascii(receipt)[:60]}: check the id; one that was given "
                "within the last second may not be logged yet, then tell it again",
            )
        if experiment is not None and row.experiment_id != experiment.id:
            other = rows.by_id(connection, row.experiment_id)
            if other.adapter != experiment.adapter:
                return Recorded("unknown", f"receipt {ascii(receipt)[:60]} is of {other}, not of {experiment}")
        return row
    assert unit is not None
    assert experiment is not None
    mine = (assignments.c.experiment_id == experiment.id) & (assignments.c.unit == assign.key_of(experiment.salt, unit))
    row = connection.execute(select(assignments).where(mine).order_by(assignments.c.id.desc()).limit(1)).first()
    if row is None:
        return Recorded(
            "unknown",
            f"{experiment} never answered {experiment.unit} {ascii(unit)[:60]}: tell outcomes of what it answered",
            str(experiment),
        )
    return row


def _too_late(connection: Connection, experiment: Experiment, unit: str, at: str) -> float | None:
    """Seconds since the unit was first answered, where that is longer than outcomes live."""
    if experiment.outcome_ttl is None:
        return None
    mine = _first(experiment, 0) & (assignments.c.unit == unit)
    first = connection.execute(select(assignments.c.at).where(mine)).scalar_one()
    waited = seconds_between(first, at)
    return waited if waited > experiment.outcome_ttl else None


def _is_receipt(receipt: str) -> bool:
    return 0 < len(receipt) <= LONGEST_RECEIPT and receipt.isprintable()


def _there(connection: Connection, column: Any, values: Sequence[str], also: Any = None) -> set[str]:
    """Which of these values the column holds."""
    found: set[str] = set()
    for start in range(0, len(values), AT_ONCE):
        query = select(column).where(column.in_(values[start : start + AT_ONCE])).distinct()
        found |= set(connection.execute(query if also is None else query.where(also)).scalars())
    return found


def grouped(found: Sequence[Recorded]) -> Mapping[str, int]:
    """How many outcomes had which status."""
    counts: dict[str, int] = {}
    for each in found:
        counts[each.status] = counts.get(each.status, 0) + 1
    return counts
