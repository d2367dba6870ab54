"""Decisions of experiments carried out: an arm rolled back or promoted, or the evidence declared void.

What ends an experiment and what moves its alias is one transaction of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from turret.errors import ExperimentError, GateFailed, ReplayNeeded
from turret.experiments import rows
from turret.experiments.experiment import Experiment
from turret.store import Store
from turret.store.catalog import now, who

if TYPE_CHECKING:
    from turret.experiments.analyze import Analysis


def carry_out(store: Store, weighed: Analysis) -> str | None:
    """Do what was decided; None where there is nothing to do, or it was tried and refused."""
    experiment, decision = weighed.experiment, weighed.decision
    if decision.action == "hold":
        return None if weighed.recorded else _alarmed(store, weighed)
    if decision.action not in ("drop", "promote"):
        return None
    assert decision.arm is not None
    arm = experiment.arm(decision.arm)
    reference, control = experiment.reference(arm), experiment.reference(experiment.control)
    try:
        if decision.action == "drop":
            drop = _dropping(weighed, decision.arm)
            if arm.role == "shadow":  # it never answered: the alias has nothing to do with it
                with store.database().writing() as connection:
                    drop(connection)
            else:
                store.back_to(control, experiment.alias, leaving=[reference], also=drop)
            return f"{arm.name} ({reference}) rolled back: {decision.why}"
        if any(each["verb"] == "refused" and each["detail"].get("arm") == arm.name for each in weighed.history):
            return None
        said = summary(weighed) | {"how": "promote", "arm": arm.name, "why": decision.why}
        store.promote(reference, experiment.alias, also=ending(experiment, said))
    except (GateFailed, ReplayNeeded) as error:
        _refuse(store, experiment, arm.name, str(error))
        return f"{arm.name} ({reference}) is better and was not promoted: {error}"
    except ExperimentError:  # another process has ended it meanwhile
        return None
    return f"{arm.name} ({reference}) promoted to {experiment.alias}: {decision.why}"


def _dropping(weighed: Analysis, name: str) -> Callable[[Connection], None]:
    def drop(connection: Connection) -> None:
        current = rows.still_running(connection, weighed.experiment)
        arm = current.arm(name)
        if not arm.live:
            raise ExperimentError(f"{name} of {current} was rolled back already")
        others = [each for each in current.arms[1:] if each.live and each.name != name]
        why = weighed.decision.why
        rows.drop(connection, current, arm, {"why": why}, now(), who())
        if not others:
            rows.end(connection, current, summary(weighed) | {"how": "rollback", "arm": name, "why": why}, now(), who())

    return drop


def ending(experiment: Experiment, verdict: Mapping[str, Any]) -> Callable[[Connection], None]:
    """Ends the experiment with that verdict, in the transaction that moves its alias."""

    def end(connection: Connection) -> None:
        rows.end(connection, experiment, verdict, now(), who())

    return end


def _alarmed(store: Store, weighed: Analysis) -> str | None:
    """Write down, once, that the evidence is void: from then on it stays so, whatever comes."""
    from turret.experiments.analyze import VOID
    from turret.experiments.status_text import void

    why = void(weighed)
    try:
        with store.database().writing() as connection:
            current = rows.still_running(connection, weighed.experiment)
            if any(each["verb"] == VOID for each in rows.events(connection, current)):
                return None  # another process was quicker
            rows.add_event(connection, current, VOID, {"check": weighed.alarm, "why": why}, now(), who())
    except ExperimentError:  # another process has ended it meanwhile
        return None
    return why


def check_valid(weighed: Analysis, arm: str) -> None:
    """Raises ExperimentError where the evidence is void."""
    if weighed.alarm is None:
        return
    running = weighed.experiment
    version = running.reference(running.arm(arm))
    raise ExperimentError(
        f"{running} is void ({weighed.alarm} of the arms differ): it can promote nothing; `turret experiment stop "
        f"{running.adapter}` and begin anew, or `turret promote {version} {running.alias}` without its evidence"
    )


def _refuse(store: Store, experiment: Experiment, arm: str, why: str) -> None:
    with store.database().writing() as connection:
        current = rows.by_id(connection, experiment.id)
        rows.add_event(connection, current, "refused", {"arm": arm, "why": why}, now(), who())


def summary(weighed: Analysis) -> dict[str, Any]:
    """What the evidence was at the end."""
    arms = {each.arm.name: each.against.as_json() for each in weighed.arms if each.against is not None}
    return {"candidates": arms, "log_evidence": weighed.evidence, "void": weighed.alarm}
