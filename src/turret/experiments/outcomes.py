"""Rows of answers and their outcomes. An outcome is stored once per answer, and counts once per unit.

An outcome names its answer by receipt or by unit. Recording one returns a status and raises no exception:

| status | meaning | stored | counted |
| --- | --- | --- | --- |
| counted | the first outcome of its unit | yes | yes |
| noted | its unit has already counted, by another answer | yes | no |
| repeated | this answer already has an outcome | no | no |
| unknown | no answer of an experiment has this receipt or unit | no | no |
| late | the experiment has ended, or the time to live of outcomes has passed | no | no |
| refused | the value is not an outcome of this metric | no | no |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from sqlalchemy import ColumnElement, Connection, exists, func, insert, select

from turret.database import assignments, experiments, outcomes, seen_experiments
from turret.errors import BadExperiment
from turret.experiments import assign, rows
from turret.experiments.experiment import Experiment, duration_text, seconds_between
from turret.json_types import AsJson, Plain
from turret.timestamp import to_minute

Status = Literal["counted", "noted", "repeated", "unknown", "late", "refused"]
LONGEST_RECEIPT = 100
AT_ONCE = 500  # values in one query


@dataclass(frozen=True)
class Recorded(AsJson):
    """The result of recording an outcome."""

    status: Status
    text: str  # one line for people
    experiment: str | None = None
    arm: str | None = None

    @property
    def kept(self) -> bool:
        return self.status in ("counted", "noted")


@dataclass(frozen=True)
class Seen:
    """An answer of an experiment, as it is logged."""

    experiment_id: int
    unit: str  # hashed
    arm: str
    revision: int
    probability: float
    at: str
    receipt: str | None = None


class CountedOutcome(NamedTuple):
    """An outcome that counts."""

    id: int
    arm: str
    revision: int  # of the split
    value: float
    at: str
    first: str  # time of the first answer to its unit
    first_arm: str  # of that answer


class FirstAnswer(NamedTuple):
    """The first answer to a unit."""

    id: int
    arm: str
    revision: int  # of the split
    at: str


def check_receipt(receipt: str) -> str:
    """Return a receipt that can be stored; raises BadExperiment."""
    if not _is_receipt(receipt):
        raise BadExperiment(f"receipt {ascii(receipt)[:60]}: expected 1 to {LONGEST_RECEIPT} printable characters")
    return receipt


def log(connection: Connection, seen: Sequence[Seen]) -> None:
    """Store answers in order; a receipt that is already stored is skipped."""
    known: dict[int, set[str]] = {}
    receipts = _existing(connection, assignments.c.receipt, [each.receipt for each in seen if each.receipt])
    for experiment_id in {each.experiment_id for each in seen}:
        units = [each.unit for each in seen if each.experiment_id == experiment_id]
        mine = assignments.c.experiment_id == experiment_id
        known[experiment_id] = _existing(connection, assignments.c.unit, units, mine)
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
    value: Plain,
    at: str,
    *,
    receipt: str | None = None,
    unit: str | None = None,
    experiment: Experiment | None = None,
) -> Recorded:
    """Record the outcome of the answer with this receipt, or of the last answer of `experiment` to this unit."""
    answer = _answer(connection, receipt, unit, experiment)
    if isinstance(answer, Recorded):
        return answer
    now = rows.by_id(connection, answer.experiment_id)
    names = {"experiment": str(now), "arm": answer.arm}
    if now.state != rows.RUNNING:
        return Recorded("late", f"{now} ended {to_minute(now.ended or '')}: this outcome is not counted", **names)
    number = now.metric.read(value)
    if isinstance(number, str):
        return Recorded("refused", f"{number} (the metric of {now} is {now.metric}); nothing is recorded", **names)
    mine = (outcomes.c.experiment_id == now.id) & (outcomes.c.unit == answer.unit)
    before = connection.execute(select(outcomes.c.assignment_id, outcomes.c.value).where(mine)).all()
    if same := [row.value for row in before if row.assignment_id == answer.id]:
        other = "" if same[0] == number else f", not {number:g}"
        return Recorded("repeated", f"this answer already has the outcome {same[0]:g}: it stays{other}", **names)
    if not before and (waited := _too_late(connection, now, answer.unit, at)) is not None:
        ttl = f"outcomes of {now} count for {duration_text(now.outcome_ttl or 0.0)}"
        why = f"this {now.unit} was first answered {duration_text(waited)} ago, and {ttl}: not counted"
        return Recorded("late", why, **names)
    row = {
        "assignment_id": answer.id,
        "experiment_id": now.id,
        "unit": answer.unit,
        "arm": answer.arm,
        "revision": answer.revision,
        "value": number,
        "counted": int(not before),
        "at": at,
    }
    connection.execute(insert(outcomes).values(row))
    if before:
        return Recorded(
            "noted",
            f"stored, not counted: this {now.unit} has already counted in {now}, and a {now.unit} counts once",
            **names,
        )
    return Recorded("counted", f"counted for {answer.arm} of {now}", **names)


def counted_outcomes(connection: Connection, experiment: Experiment, after: int = 0) -> Sequence[CountedOutcome]:
    """The outcomes that count, in the order in which they came, with an id above `after`."""
    mine = (outcomes.c.experiment_id == experiment.id) & (outcomes.c.counted == 1) & (outcomes.c.id > after)
    unit = (assignments.c.experiment_id == experiment.id) & (assignments.c.unit == outcomes.c.unit)
    table = outcomes.c
    query = (
        select(table.id, table.arm, table.revision, table.value, table.at, assignments.c.at, assignments.c.arm)
        .join(assignments, unit & (assignments.c.first == 1))
        .where(mine)
        .order_by(table.id)
    )
    return [CountedOutcome(*row) for row in connection.execute(query)]


def units(connection: Connection, experiment: Experiment, after: int = 0) -> Sequence[FirstAnswer]:
    """The first answer to each unit, in order, with an id above `after`."""
    query = _FIRST_ANSWERS.where(_first(experiment, after))
    return [FirstAnswer(*row) for row in connection.execute(query)]


def units_without_outcome(
    connection: Connection, experiment: Experiment, after: int, until: str | None
) -> tuple[Sequence[FirstAnswer], int]:
    """Units without an outcome that counts, among those first answered up to `until`, with an id above `after`.

    Units are read in the order of their ids, up to the first one answered after `until`.

    Returns:
        The first answers to the units, and the id to continue from.
    """
    if until is None:
        return (), after
    table, new = assignments.c, _first(experiment, after)
    younger = connection.execute(select(func.min(table.id)).where(new & (table.at > until))).scalar()
    old = new if younger is None else new & (table.id < younger)
    last = connection.execute(select(func.max(table.id)).where(old)).scalar()
    if last is None:
        return (), after
    has_outcome = (
        (outcomes.c.experiment_id == experiment.id) & (outcomes.c.unit == table.unit) & (outcomes.c.counted == 1)
    )
    query = _FIRST_ANSWERS.where(old & ~exists().where(has_outcome))
    return [FirstAnswer(*row) for row in connection.execute(query)], last


_FIRST_ANSWERS = select(*(assignments.c[column] for column in FirstAnswer._fields)).order_by(assignments.c.id)


def _first(experiment: Experiment, after: int) -> ColumnElement[bool]:
    table = assignments.c
    return (table.experiment_id == experiment.id) & (table.first == 1) & (table.id > after)


class _Answer(NamedTuple):
    """A logged answer."""

    id: int
    experiment_id: int
    unit: str
    arm: str
    revision: int


_ANSWERS = select(*(assignments.c[column] for column in _Answer._fields))


def _answer(
    connection: Connection, receipt: str | None, unit: str | None, experiment: Experiment | None
) -> _Answer | Recorded:
    """The logged answer with this receipt, or the last one to this unit."""
    if receipt is not None:
        query = _ANSWERS.join(experiments, assignments.c.experiment_id == experiments.c.id)
        query = query.where(assignments.c.receipt == receipt, seen_experiments(connection))
        row = connection.execute(query).first() if _is_receipt(receipt) else None
        if row is None:
            return Recorded(
                "unknown",
                f"no answer of an experiment has receipt {ascii(receipt)[:60]}: check the id; an answer of the last "
                "second may not be logged yet, so try again",
            )
        if experiment is not None and row.experiment_id != experiment.id:
            other = rows.by_id(connection, row.experiment_id)
            if other.adapter != experiment.adapter:
                return Recorded("unknown", f"receipt {ascii(receipt)[:60]} is of {other}, not of {experiment}")
        return _Answer(*row)
    assert unit is not None
    assert experiment is not None
    mine = (assignments.c.experiment_id == experiment.id) & (assignments.c.unit == assign.key_of(experiment.salt, unit))
    row = connection.execute(_ANSWERS.where(mine).order_by(assignments.c.id.desc()).limit(1)).first()
    if row is None:
        return Recorded(
            "unknown",
            f"{experiment} never answered {experiment.unit} {ascii(unit)[:60]}: send outcomes of its own answers",
            str(experiment),
        )
    return _Answer(*row)


def _too_late(connection: Connection, experiment: Experiment, unit: str, at: str) -> float | None:
    """Seconds since the first answer to the unit, if that is longer than the time to live of outcomes."""
    if experiment.outcome_ttl is None:
        return None
    mine = _first(experiment, 0) & (assignments.c.unit == unit)
    first = connection.execute(select(assignments.c.at).where(mine)).scalar_one()
    waited = seconds_between(first, at)
    return waited if waited > experiment.outcome_ttl else None


def _is_receipt(receipt: str) -> bool:
    return 0 < len(receipt) <= LONGEST_RECEIPT and receipt.isprintable()


def _existing(
    connection: Connection,
    column: ColumnElement[str],
    values: Sequence[str],
    condition: ColumnElement[bool] | None = None,
) -> set[str]:
    """Which of these values the column has."""
    found: set[str] = set()
    for start in range(0, len(values), AT_ONCE):
        query = select(column).where(column.in_(values[start : start + AT_ONCE])).distinct()
        found |= set(connection.execute(query if condition is None else query.where(condition)).scalars())
    return found


def count_by_status(found: Sequence[Recorded]) -> Mapping[str, int]:
    """Status -> number of outcomes with it."""
    return Counter(each.status for each in found)
