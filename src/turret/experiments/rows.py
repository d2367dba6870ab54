"""Experiments as rows: begun, found, split anew, ended, each inside a transaction of the caller's. Refuses to know what
the evidence says and what a version is beyond its number and digest.

One experiment of a name is running at a time. What changes is said twice: in the row, as it is now, and as an event,
which is only added to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from turret.database import adapters, experiment_events, experiment_splits, experiments
from turret.errors import Corrupt, ExperimentError, NotFound
from turret.experiments import assign
from turret.experiments.experiment import CONTROL, Arm, Experiment, Guards, Metric, shares

RUNNING, ENDED = "running", "ended"


def begin(connection: Connection, wanted: Experiment, share: float | Mapping[str, float]) -> Experiment:
    """Write a new experiment down (its `id`, `number` and split are given here); raises ExperimentError."""
    adapter_id = _adapter(connection, wanted.adapter)
    if there := running(connection, wanted.adapter):
        raise ExperimentError(
            f"{there} is running since {there.created[:16].replace('T', ' ')} UTC: stop it with "
            f"`turret experiment stop {there.adapter}` before another begins"
        )
    last = connection.execute(select(func.max(experiments.c.number)).where(experiments.c.adapter_id == adapter_id))
    number = (last.scalar() or 0) + 1
    settings = {
        "metric": asdict(wanted.metric),
        "unit": wanted.unit,
        "alpha": wanted.alpha,
        "guards": asdict(wanted.guards),
        "steps": list(wanted.steps),
        "outcome_ttl": wanted.outcome_ttl,
    }
    row = {
        "adapter_id": adapter_id,
        "number": number,
        "state": RUNNING,
        "alias": wanted.alias,
        "salt": wanted.salt,
        "settings": settings,
        "arms": [asdict(arm) for arm in wanted.arms],
        "created": wanted.created,
        "who": wanted.who,
    }
    made = connection.execute(insert(experiments).values(row)).inserted_primary_key
    assert made is not None
    weights = shares(wanted.arms, share) if wanted.candidates else {CONTROL: 1.0}
    _split(connection, made[0], 1, assign.laid_out(weights), wanted.created)
    begun = _one(connection, experiments.c.id == made[0])
    arms = {arm.name: begun.reference(arm) for arm in begun.arms}
    add_event(connection, begun, "start", {"arms": arms, "weights": _said(begun)}, wanted.created, wanted.who)
    return begun


def running(connection: Connection, adapter: str) -> Experiment | None:
    """The experiment that runs on this name."""
    rows = list(_found(connection, (adapters.c.name == adapter) & (experiments.c.state == RUNNING)))
    return rows[0] if rows else None


def all_running(connection: Connection) -> list[Experiment]:
    return list(_found(connection, experiments.c.state == RUNNING))


def listed(connection: Connection) -> list[Experiment]:
    """All there ever were, by name and number."""
    return list(_found(connection, experiments.c.id > 0))


def find(connection: Connection, adapter: str, number: int | None = None) -> Experiment:
    """The experiment of that number, the running one or the last one; raises NotFound saying which there are."""
    there = list(_found(connection, adapters.c.name == adapter))
    if number is not None:
        chosen = [each for each in there if each.number == number]
    else:
        chosen = [each for each in there if each.state == RUNNING] or there[-1:]
    if not chosen:
        what = f"no experiment {adapter}#{number}" if number is not None else f"no experiment on {adapter}"
        known = f"there are {there[0]} to {there[-1]}" if there else "`turret experiment start` begins one"
        raise NotFound(f"{what}: {known}")
    return chosen[0]


def by_id(connection: Connection, experiment_id: int) -> Experiment:
    return _one(connection, experiments.c.id == experiment_id)


def still_running(connection: Connection, known: Experiment) -> Experiment:
    """As it is now; raises ExperimentError where somebody ended it meanwhile."""
    now = by_id(connection, known.id)
    if now.state != RUNNING:
        raise ExperimentError(
            f"{now} has ended ({(now.verdict or {}).get('how', 'stopped')}, {(now.ended or '')[:16].replace('T', ' ')} "
            f"UTC): start another with `turret experiment start {now.adapter}`"
        )
    return now


def ramp(
    connection: Connection, known: Experiment, share: float | Mapping[str, float], at: str, who: str | None
) -> Experiment:
    """Split the traffic anew, moving only the units that must move."""
    now = still_running(connection, known)
    if not any(arm.live for arm in now.candidates):
        raise ExperimentError(f"{now} has only shadows beside its control: there is no traffic to split")
    return _resplit(connection, now, shares(now.arms, share), "ramp", {}, at, who)


def drop(
    connection: Connection, known: Experiment, arm: Arm, why: Mapping[str, Any], at: str, who: str | None
) -> Experiment:
    """Take an arm out while others go on; the control gets its units."""
    now = still_running(connection, known)
    arms = [replace(each, live=False) if each.name == arm.name else each for each in now.arms]
    _update(connection, now.id, arms=[asdict(each) for each in arms])
    weights = {name: weight for name, weight in now.weights.items() if name not in (arm.name, CONTROL)}
    total = sum(weights.values())
    return _resplit(connection, now, {CONTROL: 1 - total, **weights}, "drop", {"arm": arm.name, **why}, at, who)


def end(connection: Connection, known: Experiment, verdict: Mapping[str, Any], at: str, who: str | None) -> Experiment:
    """End it; `verdict["how"]` is stop, rollback or promote."""
    now = still_running(connection, known)
    _update(connection, now.id, state=ENDED, ended=at, verdict=dict(verdict))
    add_event(connection, now, str(verdict["how"]), verdict, at, who)
    return by_id(connection, now.id)


def add_event(
    connection: Connection, experiment: Experiment, verb: str, detail: Mapping[str, Any], at: str, who: str | None
) -> None:
    row = {"experiment_id": experiment.id, "verb": verb, "detail": dict(detail), "at": at, "who": who}
    connection.execute(insert(experiment_events).values(row))


def events(connection: Connection, experiment: Experiment) -> list[dict[str, Any]]:
    """Its history, oldest first."""
    query = select(experiment_events).where(experiment_events.c.experiment_id == experiment.id)
    rows = connection.execute(query.order_by(experiment_events.c.id))
    return [{"verb": row.verb, "at": row.at, "who": row.who, "detail": row.detail} for row in rows]


def probabilities(connection: Connection, experiment: Experiment) -> dict[int, dict[str, float]]:
    """Revision -> arm -> the probability with which a unit was sent to it."""
    query = select(experiment_splits).where(experiment_splits.c.experiment_id == experiment.id)
    return {row.revision: _weights(_segments(row.segments)) for row in connection.execute(query)}


def splits(connection: Connection, experiment: Experiment) -> list[tuple[str, dict[str, float]]]:
    """When each split began, and the weights of its arms, oldest first."""
    mine = experiment_splits.c.experiment_id == experiment.id
    rows = connection.execute(select(experiment_splits).where(mine).order_by(experiment_splits.c.revision))
    return [(row.created, _weights(_segments(row.segments))) for row in rows]


# --- the inside ------------------------------------------------------------------------------------------------------


def _resplit(
    connection: Connection,
    now: Experiment,
    weights: Mapping[str, float],
    verb: str,
    detail: Mapping[str, Any],
    at: str,
    who: str | None,
) -> Experiment:
    _split(connection, now.id, now.revision + 1, assign.moved(now.segments, weights), at)
    then = by_id(connection, now.id)
    add_event(connection, then, verb, {**detail, "weights": _said(then), "before": _said(now)}, at, who)
    return then


def _split(connection: Connection, experiment_id: int, revision: int, segments: assign.Segments, at: str) -> None:
    row = {"experiment_id": experiment_id, "revision": revision, "segments": [list(each) for each in segments]}
    connection.execute(insert(experiment_splits).values(**row, created=at))


def _update(connection: Connection, experiment_id: int, **values: Any) -> None:
    connection.execute(update(experiments).where(experiments.c.id == experiment_id).values(**values))


def _adapter(connection: Connection, name: str) -> int:
    return int(connection.execute(select(adapters.c.id).where(adapters.c.name == name)).scalar_one())


def _one(connection: Connection, condition: Any) -> Experiment:
    (found,) = _found(connection, condition)
    return found


def _found(connection: Connection, condition: Any) -> Iterator[Experiment]:
    """Experiments with their newest split."""
    newest = (
        select(experiment_splits.c.experiment_id, func.max(experiment_splits.c.revision).label("revision"))
        .group_by(experiment_splits.c.experiment_id)
        .subquery()
    )
    same = (experiment_splits.c.experiment_id == newest.c.experiment_id) & (
        experiment_splits.c.revision == newest.c.revision
    )
    query = (
        select(experiments, adapters.c.name, newest.c.revision, experiment_splits.c.segments)
        .join(adapters, experiments.c.adapter_id == adapters.c.id)
        .join(newest, newest.c.experiment_id == experiments.c.id)
        .join(experiment_splits, same)
        .where(condition)
        .order_by(adapters.c.name, experiments.c.number)
    )
    return (_read(row) for row in connection.execute(query).all())


def _read(row: Row[Any]) -> Experiment:
    """The experiment, of a row that may come from a store of somebody else's."""
    try:
        found = _experiment(row)
        if found.arms[0].name != CONTROL:
            raise ValueError
        return found
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Corrupt(
            f"experiment {row.name}#{row.number} makes no sense in the database: restore it from a copy"
        ) from None


def _experiment(row: Row[Any]) -> Experiment:
    segments = _segments(row.segments)
    return Experiment(
        id=row.id,
        adapter=row.name,
        number=row.number,
        state=row.state,
        alias=row.alias,
        salt=row.salt,
        metric=Metric(**row.settings["metric"]),
        unit=row.settings["unit"],
        alpha=row.settings["alpha"],
        guards=Guards(**row.settings["guards"]),
        steps=tuple(row.settings["steps"]),
        outcome_ttl=row.settings.get("outcome_ttl"),  # none was kept of experiments that began before there was one
        arms=tuple(Arm(**arm) for arm in row.arms),
        revision=row.revision,
        segments=segments,
        weights=_weights(segments),
        created=row.created,
        who=row.who,
        ended=row.ended,
        verdict=row.verdict,
    )


def _segments(rows: Sequence[Sequence[Any]]) -> assign.Segments:
    return tuple((int(end), str(arm)) for end, arm in rows)


def _weights(segments: assign.Segments) -> dict[str, float]:
    return {arm: points / assign.GRID for arm, points in assign.points(segments).items()}


def _said(experiment: Experiment) -> dict[str, float]:
    return {arm: round(weight, 6) for arm, weight in experiment.weights.items()}
