"""Carry out decisions of experiments: roll an arm back, promote an arm, or declare the evidence void.

Ending an experiment and moving its alias is one transaction of the store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from turret.errors import ExperimentError, GateFailed, ReplayNeeded
from turret.experiments import rows
from turret.experiments.experiment import Experiment
from turret.json_types import JsonMapping, JsonObject
from turret.store import Store
from turret.store.catalog import now, who

if TYPE_CHECKING:
    from turret.experiments.analyze import Analysis


def carry_out(store: Store, analysis: Analysis) -> str | None:
    """Carry out the decision of an analysis.

    Returns:
        What was done or refused; None if nothing changed.
    """
    experiment, decision = analysis.experiment, analysis.decision
    if decision.action == "hold":
        return None if analysis.recorded else _record_alarm(store, analysis)
    if decision.action not in ("drop", "promote"):
        return None
    assert decision.arm is not None
    arm = experiment.arm(decision.arm)
    reference, control = experiment.reference(arm), experiment.reference(experiment.control)
    try:
        if decision.action == "drop":
            drop = _drop(analysis, decision.arm)
            if arm.role == "shadow":  # the alias never pointed at a shadow
                with store.database().writing() as connection:
                    drop(connection)
            else:
                store.back_to(control, experiment.alias, leaving=[reference], also=drop)
            return f"{arm.name} ({reference}) rolled back: {decision.why}"
        if any(event["verb"] == "refused" and event["detail"].get("arm") == arm.name for event in analysis.history):
            return None
        verdict = summary(analysis) | {"how": "promote", "arm": arm.name, "why": decision.why}
        store.promote(reference, experiment.alias, also=ending(experiment, verdict))
    except (GateFailed, ReplayNeeded) as error:
        _record_refusal(store, experiment, arm.name, str(error))
        return f"{arm.name} ({reference}) is better and was not promoted: {error}"
    except ExperimentError:  # another process has ended the experiment meanwhile
        return None
    return f"{arm.name} ({reference}) promoted to {experiment.alias}: {decision.why}"


def _drop(analysis: Analysis, name: str) -> Callable[[Connection], None]:
    """A step of a transaction: drop an arm, and end the experiment if no candidate is left."""

    def drop(connection: Connection) -> None:
        current = rows.still_running(connection, analysis.experiment)
        arm = current.arm(name)
        if not arm.live:
            raise ExperimentError(f"{name} of {current} was rolled back already")
        others = [each for each in current.arms[1:] if each.live and each.name != name]
        why = analysis.decision.why
        rows.drop(connection, current, arm, {"why": why}, now(), who())
        if not others:
            verdict = summary(analysis) | {"how": "rollback", "arm": name, "why": why}
            rows.end(connection, current, verdict, now(), who())

    return drop


def ending(experiment: Experiment, verdict: JsonMapping) -> Callable[[Connection], None]:
    """A step of a transaction: end the experiment with this verdict."""

    def end(connection: Connection) -> None:
        rows.end(connection, experiment, verdict, now(), who())

    return end


def _record_alarm(store: Store, analysis: Analysis) -> str | None:
    """Record once that the evidence is void. It stays void, whatever later outcomes show."""
    from turret.experiments.analyze import VOID
    from turret.experiments.status_text import void

    why = void(analysis)
    try:
        with store.database().writing() as connection:
            current = rows.still_running(connection, analysis.experiment)
            if any(event["verb"] == VOID for event in rows.events(connection, current)):
                return None  # another process recorded it first
            rows.add_event(connection, current, VOID, {"check": analysis.alarm, "why": why}, now(), who())
    except ExperimentError:  # another process has ended the experiment meanwhile
        return None
    return why


def check_valid(analysis: Analysis, arm: str) -> None:
    """Raise ExperimentError if the evidence is void."""
    if analysis.alarm is None:
        return
    experiment = analysis.experiment
    version = experiment.reference(experiment.arm(arm))
    raise ExperimentError(
        f"{experiment} is void ({analysis.alarm} of the arms differ) and can promote nothing: `turret experiment stop "
        f"{experiment.adapter}` and start again, or `turret promote {version} {experiment.alias}` without its evidence"
    )


def _record_refusal(store: Store, experiment: Experiment, arm: str, why: str) -> None:
    with store.database().writing() as connection:
        current = rows.by_id(connection, experiment.id)
        rows.add_event(connection, current, "refused", {"arm": arm, "why": why}, now(), who())


def summary(analysis: Analysis) -> JsonObject:
    """The evidence at the end of an experiment, as JSON."""
    arms = {each.arm.name: each.against.as_json() for each in analysis.arms if each.against is not None}
    return {"candidates": arms, "log_evidence": analysis.evidence, "void": analysis.alarm}
