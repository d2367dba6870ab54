"""Rows of experiments: start, find, split and end one, each in a transaction of the caller.

At most one experiment of a name is running. A change is written twice: to the row, which has the current state, and as
an event, which is append-only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from operator import add
from typing import NamedTuple, TypedDict

from sqlalchemy import ColumnElement, Connection, RowMapping, func, insert, select, update

from turret import audit
from turret.database import (
    adapters,
    experiment_events,
    experiment_health,
    experiment_splits,
    experiments,
    insert_row,
    seen_adapters,
    seen_arms,
)
from turret.errors import Corrupt, ExperimentError, NotFound
from turret.experiments import assign
from turret.experiments.experiment import CONTROL, MISSING_BOUND, Arm, Experiment, Guards, Metric, shares
from turret.json_types import JsonObject, Plain
from turret.timestamp import to_minute

RUNNING, ENDED = "running", "ended"
SETTINGS = ("metric", "unit", "alpha", "guards", "steps", "outcome_ttl", "missing_bound")  # one column of the row


class EventDetail(TypedDict, total=False):
    """What an entry of the history says, by its verb. weights: of the arms, by their names, and `before` the change."""

    arms: dict[str, str]
    weights: dict[str, float]
    before: dict[str, float]
    arm: str | None
    version: str
    why: str
    did: str
    moved: str
    check: str
    how: str


class Event(TypedDict):
    """An entry of the history of an experiment."""

    verb: str
    at: str
    who: str | None
    detail: EventDetail


def begin(connection: Connection, settings: Experiment, split: float | Mapping[str, float]) -> Experiment:
    """Store a new experiment and start it.

    Args:
        settings: its `id`, `number`, `revision`, `segments` and `weights` are ignored.
        split: the share of all candidates together, or a share for each.

    Raises:
        ExperimentError: another experiment of the name is running.
    """
    found = select(adapters.c.id).where(adapters.c.name == settings.adapter, seen_adapters(connection))
    adapter_id = int(connection.execute(found).scalar_one())
    if current := running_experiment(connection, settings.adapter):
        raise ExperimentError(
            f"{current} has been running since {to_minute(current.created)}: stop it with "
            f"`turret experiment stop {current.adapter}` before you start another"
        )
    hidden = select(experiments.c.id).where(experiments.c.adapter_id == adapter_id, experiments.c.state == RUNNING)
    if connection.execute(hidden).first() is not None:
        raise ExperimentError(f"{settings.adapter} has a running experiment with versions that you may not use")
    fields = asdict(settings)
    last = connection.execute(select(func.max(experiments.c.number)).where(experiments.c.adapter_id == adapter_id))
    row = {
        "adapter_id": adapter_id,
        "number": (last.scalar() or 0) + 1,
        "state": RUNNING,
        "alias": settings.alias,
        "salt": settings.salt,
        "settings": {name: fields[name] for name in SETTINGS},
        "arms": fields["arms"],
        "created": settings.created,
        "who": settings.who,
    }
    experiment_id = insert_row(connection, experiments, row)
    weights = shares(settings.arms, split) if settings.candidates else {CONTROL: 1.0}
    _add_split(connection, experiment_id, 1, assign.laid_out(weights), settings.created)
    begun = by_id(connection, experiment_id)
    detail: JsonObject = {
        "arms": {arm.name: begun.reference(arm) for arm in begun.arms},
        "weights": _rounded_weights(begun),
    }
    add_event(connection, begun, "start", detail, settings.created, settings.who)
    return begun


def running_experiment(connection: Connection, adapter: str) -> Experiment | None:
    """The running experiment of this name, or None."""
    condition = (adapters.c.name == adapter) & (experiments.c.state == RUNNING)
    return next(iter(_select(connection, condition)), None)


def running_experiments(connection: Connection) -> list[Experiment]:
    return _select(connection, experiments.c.state == RUNNING)


def list_experiments(connection: Connection) -> list[Experiment]:
    """All experiments of the store, by name and number."""
    return _select(connection, experiments.c.id > 0)


def find(connection: Connection, adapter: str, number: int | None = None) -> Experiment:
    """The experiment with this number; without one the running experiment, or the last.

    Raises:
        NotFound: it does not exist; the text lists those that do.
    """
    existing = _select(connection, adapters.c.name == adapter)
    if number is not None:
        chosen = [each for each in existing if each.number == number]
    else:
        chosen = [each for each in existing if each.state == RUNNING] or existing[-1:]
    if not chosen:
        missing = f"no experiment {adapter}#{number}" if number is not None else f"no experiment on {adapter}"
        known = f"there are {existing[0]} to {existing[-1]}" if existing else "`turret experiment start` starts one"
        raise NotFound(f"{missing}: {known}")
    return chosen[0]


def by_id(connection: Connection, experiment_id: int) -> Experiment:
    (found,) = _select(connection, experiments.c.id == experiment_id)
    return found


def still_running(connection: Connection, known: Experiment) -> Experiment:
    """The current state of a running experiment; raises ExperimentError if it has ended."""
    now = by_id(connection, known.id)
    if now.state != RUNNING:
        raise ExperimentError(
            f"{now} has ended ({(now.verdict or {}).get('how', 'stopped')}, {to_minute(now.ended or '')}): "
            f"start another with `turret experiment start {now.adapter}`"
        )
    return now


def ramp(
    connection: Connection, known: Experiment, split: float | Mapping[str, float], at: str, who: str | None
) -> Experiment:
    """Change the split; only the units that must change their arm do so."""
    now = still_running(connection, known)
    if not any(arm.live for arm in now.candidates):
        raise ExperimentError(f"{now} has only shadows and a control: there is no traffic to split")
    return _resplit(connection, now, shares(now.arms, split), "ramp", {}, at, who)


def drop(
    connection: Connection, known: Experiment, arm: Arm, why: Mapping[str, Plain], at: str, who: str | None
) -> Experiment:
    """Drop an arm while the others continue; the control gets its units."""
    now = still_running(connection, known)
    arms = [replace(each, live=False) if each.name == arm.name else each for each in now.arms]
    _update(connection, now.id, {"arms": [asdict(each) for each in arms]})
    weights = {name: weight for name, weight in now.weights.items() if name not in (arm.name, CONTROL)}
    total = sum(weights.values())
    return _resplit(connection, now, {CONTROL: 1 - total, **weights}, "drop", {"arm": arm.name, **why}, at, who)


def end(
    connection: Connection, known: Experiment, verdict: Mapping[str, Plain], at: str, who: str | None
) -> Experiment:
    """End the experiment; `verdict["how"]` is stop, rollback or promote."""
    now = still_running(connection, known)
    _update(connection, now.id, {"state": ENDED, "ended": at, "verdict": dict(verdict)})
    add_event(connection, now, str(verdict["how"]), verdict, at, who)
    return by_id(connection, now.id)


def add_event(
    connection: Connection, experiment: Experiment, verb: str, detail: Mapping[str, Plain], at: str, who: str | None
) -> None:
    row = {"experiment_id": experiment.id, "verb": verb, "detail": dict(detail), "at": at, "who": who}
    connection.execute(insert(experiment_events).values(row))
    before = {"weights": detail["before"]} if "before" in detail else None
    after = {key: value for key, value in detail.items() if key != "before"}
    what = f"experiment {verb}"
    audit.record(connection, what, str(experiment), experiment.adapter, before=before, after=after, at=at, who=who)


def events(connection: Connection, experiment: Experiment) -> list[Event]:
    """The history of an experiment, oldest first."""
    query = select(experiment_events).where(experiment_events.c.experiment_id == experiment.id)
    rows = connection.execute(query.order_by(experiment_events.c.id))
    return [{"verb": row.verb, "at": row.at, "who": row.who, "detail": row.detail} for row in rows]


def probabilities(connection: Connection, experiment: Experiment) -> dict[int, dict[str, float]]:
    """Revision -> arm -> the probability of that arm for a unit."""
    query = select(experiment_splits).where(experiment_splits.c.experiment_id == experiment.id)
    return {row.revision: _weights(_segments(row.segments)) for row in connection.execute(query)}


def splits(connection: Connection, experiment: Experiment) -> list[tuple[str, dict[str, float]]]:
    """Start and weights of each split, oldest first."""
    mine = experiment_splits.c.experiment_id == experiment.id
    rows = connection.execute(select(experiment_splits).where(mine).order_by(experiment_splits.c.revision))
    return [(row.created, _weights(_segments(row.segments))) for row in rows]


# --- private ----------------------------------------------------------------------------------------------------------


def _resplit(
    connection: Connection,
    now: Experiment,
    weights: Mapping[str, float],
    verb: str,
    detail: Mapping[str, Plain],
    at: str,
    who: str | None,
) -> Experiment:
    _add_split(connection, now.id, now.revision + 1, assign.move_segments(now.segments, weights), at)
    then = by_id(connection, now.id)
    add_event(
        connection, then, verb, {**detail, "weights": _rounded_weights(then), "before": _rounded_weights(now)}, at, who
    )
    return then


def _add_split(connection: Connection, experiment_id: int, revision: int, segments: assign.Segments, at: str) -> None:
    row = {"experiment_id": experiment_id, "revision": revision, "segments": [list(each) for each in segments]}
    connection.execute(insert(experiment_splits).values(**row, created=at))


def _update(connection: Connection, experiment_id: int, values: Mapping[str, Plain]) -> None:
    connection.execute(update(experiments).where(experiments.c.id == experiment_id).values(values))


_SPLITS = experiment_splits.alias()
_NEWEST = select(func.max(_SPLITS.c.revision)).where(_SPLITS.c.experiment_id == experiments.c.id).scalar_subquery()
_NEWEST_SPLIT = (experiment_splits.c.experiment_id == experiments.c.id) & (experiment_splits.c.revision == _NEWEST)
_EXPERIMENTS = (
    select(experiments, adapters.c.name, experiment_splits.c.revision, experiment_splits.c.segments)
    .join(adapters, experiments.c.adapter_id == adapters.c.id)
    .join(experiment_splits, _NEWEST_SPLIT)
    .order_by(adapters.c.name, experiments.c.number)
)


def _select(connection: Connection, condition: ColumnElement[bool]) -> list[Experiment]:
    """Experiments with their newest split, by name and number."""
    query = _EXPERIMENTS.where(condition, seen_adapters(connection), seen_arms(connection))
    return [_experiment_of(row) for row in connection.execute(query).mappings().all()]


def _experiment_of(row: RowMapping) -> Experiment:
    """Build the experiment; raises Corrupt for a row that Turret did not write."""
    try:
        found = _experiment(row)
        if found.arms[0].name != CONTROL:
            raise ValueError
        return found
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Corrupt(
            f"experiment {row['name']}#{row['number']} cannot be read from the database: restore it from a copy"
        ) from None


def _experiment(row: RowMapping) -> Experiment:
    same = ("id", "number", "state", "alias", "salt", "revision", "created", "who", "ended", "verdict")
    kept: JsonObject = {"outcome_ttl": None, "missing_bound": MISSING_BOUND}  # older experiments have neither
    kept |= {name: value for name, value in row["settings"].items() if name in SETTINGS}  # a newer turret may know more
    kept |= {"metric": Metric(**kept["metric"]), "guards": Guards(**kept["guards"]), "steps": tuple(kept["steps"])}
    segments = _segments(row["segments"])
    return Experiment(
        **{name: row[name] for name in same},
        **kept,
        adapter=row["name"],
        arms=tuple(Arm(**arm) for arm in row["arms"]),
        segments=segments,
        weights=_weights(segments),
    )


def _segments(rows: Iterable[tuple[int, str]]) -> assign.Segments:
    return tuple((int(end), str(arm)) for end, arm in rows)


def _weights(segments: assign.Segments) -> dict[str, float]:
    return {arm: points / assign.GRID for arm, points in assign.points(segments).items()}


def _rounded_weights(experiment: Experiment) -> dict[str, float]:
    return {arm: round(weight, 6) for arm, weight in experiment.weights.items()}


# --- health of the arms -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArmHealth:
    """Sums over answers of one arm. slow: those that took longer than the guard's `max_seconds`."""

    answers: int = 0
    errors: int = 0
    slow: int = 0
    seconds: float = 0.0
    compared: int = 0  # answers of a shadow that were compared with the returned answer
    agreed: int = 0

    def __add__(self, other: ArmHealth) -> ArmHealth:
        return ArmHealth(*map(add, vars(self).values(), vars(other).values()))


class HealthRow(NamedTuple):
    """What one process saw of one arm in about one second: a server process writes one row per arm and second."""

    id: int
    arm: str
    at: str
    seen: ArmHealth


def keep_health(connection: Connection, sums: Mapping[tuple[int, str], ArmHealth], at: str) -> None:
    """Write sums by experiment id and arm."""
    found = [{"experiment_id": key[0], "arm": key[1], **asdict(each), "at": at} for key, each in sums.items()]
    if found:
        connection.execute(insert(experiment_health), found)


def health_rows(connection: Connection, experiment: Experiment, after: int = 0) -> Sequence[HealthRow]:
    """The rows of an experiment with an id above `after`, in order."""
    table = experiment_health.c
    query = select(table.id, table.arm, table.at, *(table[each.name] for each in fields(ArmHealth)))
    found = connection.execute(query.where(table.experiment_id == experiment.id, table.id > after).order_by(table.id))
    return [HealthRow(row.id, row.arm, row.at, ArmHealth(*row[3:])) for row in found]
