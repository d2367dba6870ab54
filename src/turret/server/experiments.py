"""`/api/outcomes`, `/api/experiments`: what came of answers, traffic split between versions. Decode, call, encode."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import Body, Path, Query

from turret.experiments import Guards, Recorded, Told
from turret.experiments.outcomes import grouped
from turret.server import admin_schemas as said
from turret.server import golden_replay
from turret.server.admin_schemas import AdapterName, Experiments, Outcomes, RampRequest, StartRequest, StopRequest
from turret.server.error_responses import without_paths
from turret.server.routes import Here, router
from turret.server.state import ServerState
from turret.workspace.experimenting import ExperimentStatus

outcomes, control = router("infer or admin"), router("admin")
Name = Annotated[AdapterName, Path(description="Of the adapter.")]
KINDS = ("cmpl-", "chatcmpl-", "classify-")  # what goes before a receipt in the id of a body


@outcomes.post("/api/outcomes")
async def tell(body: Annotated[said.Told, Body()], here: Here) -> Outcomes:
    """What came of one answer, or of many: each is answered for itself, in their order."""
    many = body if isinstance(body, list) else [body]
    found = await here.telling(here.routing.router.outcomes, [_told(each) for each in many])
    for each in found:
        here.metrics.told(each.experiment, each.status)
    return Outcomes(outcomes=[_became(each) for each in found], counts=dict(grouped(found)))


def _told(outcome: said.Outcome) -> Told:
    if isinstance(outcome, said.OutcomeOfUnit):
        return Told(outcome.value, unit=outcome.unit, adapter=outcome.adapter)
    receipt = outcome.receipt
    for kind in KINDS:
        receipt = receipt.removeprefix(kind)
    return Told(outcome.value, receipt=receipt)


def _became(found: Recorded) -> said.BecameOf:
    return said.BecameOf(**found.as_json())


@control.get("/api/experiments")
async def list_experiments(here: Here, alpha: Annotated[float, Query(gt=0, le=0.5)] = 0.05) -> Experiments:
    """Every experiment with its evidence, and which are discoveries at this level, over all of them."""
    found = await here.control(here.workspace.experiments, alpha=alpha)
    return Experiments(alpha=alpha, experiments=list(found))


@control.get("/api/experiments/{name}")
async def show_experiment(
    name: Name, here: Here, number: Annotated[int | None, Query(ge=1, le=1 << 31)] = None
) -> dict[str, Any]:
    """The running experiment of a name, or its last, or that one: all that is known, and what to do."""
    return _shown(here, await here.control(_status, here, name, number))


@control.post("/api/experiments/{name}/start")
async def start_experiment(name: Name, body: StartRequest, here: Here) -> dict[str, Any]:
    """Begin: the versions are loaded first, and nothing begins where one cannot be."""
    await here.control(here.workspace.resolve, name)
    versions = [*body.candidates, *body.shadows] + ([body.control] if body.control is not None else [])
    await here.control(_load, here, versions)
    settings = body.model_dump(exclude={"guards", "candidates"}) | {"guards": Guards(**body.guards.model_dump())}
    begun = await here.control(here.workspace.experiment(name).start, body.candidates, **settings)
    return await _taken_up(here, begun)


@control.post("/api/experiments/{name}/ramp")
async def ramp_experiment(name: Name, here: Here, body: RampRequest | None = None) -> dict[str, Any]:
    """Send another share of the traffic to the candidates; no more units move than must."""
    experiment, share = here.workspace.experiment(name), None if body is None else body.share
    return await _taken_up(here, await here.control(experiment.ramp, share))


@control.post("/api/experiments/{name}/stop")
async def stop_experiment(name: Name, here: Here, body: StopRequest | None = None) -> dict[str, Any]:
    """End it, in one go with what becomes of the alias."""
    wanted = body or StopRequest()
    return await _taken_up(here, await end(here, name, None, promote=wanted.promote, rollback=wanted.rollback))


async def end(
    here: ServerState, name: str, number: int | None, *, promote: str | None, rollback: bool
) -> ExperimentStatus:
    """Stop an experiment. An arm that takes the alias is loaded first, so that no request waits, and golden examples
    are asked of the engine that serves, aside, because that may take minutes."""
    live = here.workspace.experiment(name, number)
    if promote is None or rollback:
        return await here.control(live.stop, promote=promote, rollback=rollback)
    now = (await here.control(live.status)).experiment
    arm = now.arm(promote)
    await here.control(_load, here, [now.reference(arm)])
    return await here.aside(live.stop, promote=arm.name, ask=partial(golden_replay.answers, here))


def _status(here: ServerState, name: str, number: int | None) -> ExperimentStatus:
    return here.workspace.experiment(name, number).status()


def _load(here: ServerState, references: Sequence[str]) -> None:
    for each in references:
        here.engine.warm(str(here.workspace.resolve(here.follow.exact(each))))


async def _taken_up(here: ServerState, found: ExperimentStatus) -> dict[str, Any]:
    await here.control(here.look)
    return _shown(here, found)


def _shown(here: ServerState, found: ExperimentStatus) -> dict[str, Any]:
    """As `turret experiment status --json`, and what is so on this server."""
    experiment, routing = found.experiment, here.routing
    problems = {arm: without_paths(why) for arm, why in routing.trouble(experiment).items()}
    paused = routing.paused(experiment) if experiment.state == "running" else None
    serving = {"in_force": routing.in_force(experiment), "paused": paused, "problems": problems}
    return {**found.as_json(), "serving": serving}
