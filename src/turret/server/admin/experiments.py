"""`/api/outcomes` and `/api/experiments`: outcomes of answers, and traffic split between versions."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Body, Path, Query
from pydantic import BaseModel, Field

from turret.experiments import Recorded
from turret.experiments import Told as ToldOutcome
from turret.experiments.outcomes import count_by_status
from turret.json_types import JsonObject
from turret.server import moves
from turret.server.error_responses import without_paths
from turret.server.limits import MOST_OUTCOMES, MOST_UNIT
from turret.server.routes import AdapterName, ArmName, Model, Shares, View, router
from turret.workspace.experimenting import ExperimentStatus

outcomes, control = router("infer or admin"), router("admin")
Name = Annotated[AdapterName, Path(description="Of the adapter.")]
KIND = re.compile(r"[a-z]+[-_](?=[0-9a-f]{8}-)")  # in front of a receipt, in the id of a body: `chatcmpl-`, `resp_`


Value = bool | Annotated[float, Field(ge=-1e15, le=1e15)]
RightLabel = Annotated[str, Field(min_length=1, max_length=1000)]


class OutcomeOfAnswer(Model):
    """The outcome of one answer."""

    value: Value | RightLabel = Field(
        description="0 or 1, or a number within the bounds of the experiment's metric; of an answer that a promise "
        "covers, also the right label."
    )
    receipt: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="The answer's `turret-receipt`, or the `id` in its body."
    )


class OutcomeOfUnit(Model):
    """The outcome of the last answer that an experiment gave to a unit."""

    value: Value
    unit: Annotated[str, Field(min_length=1, max_length=MOST_UNIT)]
    adapter: AdapterName


Outcome = OutcomeOfAnswer | OutcomeOfUnit
Told = Outcome | Annotated[list[Outcome], Field(min_length=1, max_length=MOST_OUTCOMES, fail_fast=True)]


class Outcomes(BaseModel):
    outcomes: list[Recorded] = Field(description="The result of each, in the same order.")
    counts: dict[str, int]


class RampRequest(Model):
    share: Shares | None = Field(None, description="Default: the next planned one.")


class StopRequest(Model):
    promote: ArmName | None = Field(default=None, description="The arm that takes the alias.")
    rollback: bool = Field(default=False, description="Give the alias to the control.")


class Experiments(BaseModel):
    alpha: float
    experiments: list[JsonObject]


@outcomes.post("/api/outcomes")
async def tell(body: Annotated[Told, Body()], view: View) -> Outcomes:
    """Record the outcome of one answer, or of many. The response has the result of each, in the same order.

    An answer of an experiment takes the values of its metric. One that a promise covers takes the right label, or 1 if
    the answer was right and 0 if not.
    """
    many = body if isinstance(body, list) else [body]
    results = await view.recording(view.record, [_told_outcome(each) for each in many])
    for result in results:
        view.metrics.outcome(result.experiment, result.status)
    return Outcomes(outcomes=results, counts=dict(count_by_status(results)))


def _told_outcome(outcome: Outcome) -> ToldOutcome:
    if isinstance(outcome, OutcomeOfUnit):
        return ToldOutcome(outcome.value, unit=outcome.unit, adapter=outcome.adapter)
    kind = KIND.match(outcome.receipt)
    return ToldOutcome(outcome.value, receipt=outcome.receipt[kind.end() if kind else 0 :])


@control.get("/api/experiments")
async def list_experiments(view: View, alpha: Annotated[float, Query(gt=0, le=0.5)] = 0.05) -> Experiments:
    """Every experiment with its evidence, and which are discoveries at this level over all of them."""
    found = await view.control(view.workspace.experiments, alpha=alpha)
    return Experiments(alpha=alpha, experiments=[{**each} for each in found])


@control.get("/api/experiments/{name}")
async def show_experiment(
    name: Name, view: View, number: Annotated[int | None, Query(ge=1, le=1 << 31)] = None
) -> JsonObject:
    """The running experiment of a name, or its last one, or the one of that number."""
    return _status_json(view, await view.control(_status, view, name, number))


@control.post("/api/experiments/{name}/start")
async def start_experiment(name: Name, body: moves.StartRequest, view: View) -> JsonObject:
    """Start an experiment. Its versions are loaded first; nothing starts if that fails."""
    started = await moves.start_experiment(view, name, body)
    return await _refreshed_status(view, started)


@control.post("/api/experiments/{name}/ramp")
async def ramp_experiment(name: Name, view: View, body: RampRequest | None = None) -> JsonObject:
    """Change the candidates' share of the traffic. As few units as possible change their arm."""
    experiment, share = view.workspace.experiment(name), None if body is None else body.share
    return await _refreshed_status(view, await view.control(experiment.ramp, share))


@control.post("/api/experiments/{name}/stop")
async def stop_experiment(name: Name, view: View, body: StopRequest | None = None) -> JsonObject:
    """End an experiment, and move its alias, in one transaction."""
    request = body or StopRequest()
    ended = await moves.end_experiment(view, name, None, promote=request.promote, rollback=request.rollback)
    return await _refreshed_status(view, ended)


def _status(view: View, name: str, number: int | None) -> ExperimentStatus:
    return view.workspace.experiment(name, number).status()


async def _refreshed_status(view: View, status: ExperimentStatus) -> JsonObject:
    await view.control(view.refresh)
    return _status_json(view, status)


def _status_json(view: View, status: ExperimentStatus) -> JsonObject:
    """As `turret experiment status --json`, with the experiment's state on this server."""
    experiment, routing = status.experiment, view.routing
    problems = {arm: without_paths(why) for arm, why in routing.problems(experiment).items()}
    paused = routing.pause_reason(experiment) if experiment.state == "running" else None
    serving = {"in_force": routing.in_force(experiment), "paused": paused, "problems": problems}
    return {**status.as_json(), "serving": serving}
