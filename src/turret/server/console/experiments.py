"""The pages of experiments: all of them, one with its evidence, and the dialogs that change it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request, Response
from fastapi.responses import JSONResponse

from turret.errors import NotFound
from turret.experiments.experiment import read_split
from turret.json_types import JsonObject
from turret.server.console import render
from turret.server.console.forms import Form, Sent, pages
from turret.server.moves import end_experiment
from turret.server.routes import State
from turret.server.state import ServerState

router = pages()
Name = Annotated[str, Path(min_length=1, max_length=200)]
Number = Annotated[int, Path(ge=1, lt=1 << 31)]
VERBS = ("ramp", "promote", "rollback", "stop")


@router.get("/experiments")
async def listing(request: Request, state: State) -> Response:
    """All experiments, the running ones first."""
    exists = await state.control(state.workspace.store.exists)
    found = await state.control(state.workspace.experiments) if exists else []
    found = sorted(found, key=lambda each: each["created"], reverse=True)
    found = sorted(found, key=lambda each: each["state"] != "running")
    return render.page(request, state, "experiments.html.j2", found=found)


@router.get("/experiments/{name}/{number}")
async def show(request: Request, state: State, name: Name, number: Number) -> Response:
    """One experiment."""
    return render.page(request, state, "experiment.html.j2", **await _values(state, name, number))


@router.get("/experiments/{name}/{number}/state")
async def show_state(request: Request, state: State, name: Name, number: Number) -> Response:
    """The live part of the page of an experiment."""
    return render.page(request, state, "experiment_state.html.j2", **await _values(state, name, number))


@router.get("/experiments/{name}/{number}/course")
async def course(state: State, name: Name, number: Number) -> Response:
    """The evidence after each outcome, for the plots."""
    found = await state.control(state.workspace.course, name, number)
    points = [
        {
            "outcomes": each.outcomes,
            "at": each.at,
            "means": each.means,
            "against": {arm: _drawn(one.as_json()) for arm, one in each.against.items()},
        }
        for each in found.points
    ]
    return JSONResponse({"points": points})


def _drawn(against: JsonObject) -> JsonObject:
    """Without the tipping point, which a course does not compute."""
    return {key: value for key, value in against.items() if key != "missing"}


@router.get("/experiments/{name}/{number}/do/{verb}")
async def ask(
    request: Request, state: State, name: Name, number: Number, verb: str, arm: str | None = None
) -> Response:
    """The dialog that confirms a change."""
    _check_verb(verb)
    values = await _values(state, name, number)
    candidates = [each for each in values["status"].analysis.arms if each.arm.role == "candidate" and each.arm.live]
    return render.page(request, state, "act.html.j2", **values, verb=verb, arm=arm, candidates=candidates)


@router.post("/experiments/{name}/{number}/do/{verb}")
async def act(request: Request, state: State, name: Name, number: Number, verb: str, form: Sent) -> Response:
    """Ramp, promote, roll back or stop."""
    _check_verb(verb)
    await _act(state, name, number, verb, form)
    await state.control(state.refresh)
    return render.redirect(request, f"/experiments/{name}/{number}")


def _check_verb(verb: str) -> None:
    if verb not in VERBS:
        raise NotFound(f"no verb {ascii(verb)[:40]}: expected one of {', '.join(VERBS)}")


async def _act(state: ServerState, name: str, number: int, verb: str, form: Form) -> None:
    if verb == "ramp":
        experiment = state.workspace.experiment(name, number)
        await state.control(experiment.ramp, read_split(form.text("share")) if form.text("share") else None)
        return
    arm = form.text("arm") if verb == "promote" else None
    await end_experiment(state, name, number, promote=arm, rollback=verb == "rollback")


async def _values(state: ServerState, name: str, number: int) -> render.Context:
    status = await state.control(state.workspace.experiment(name, number).status)
    from turret.experiments import status_text  # loads numpy, which the rest of the server does not need

    experiment, running = status.experiment, status.experiment.state == "running"
    history = [
        (each, status_text.event(each["verb"], dict(each["detail"]))) for each in reversed(status.analysis.history)
    ]
    return {
        "status": status,
        "experiment": experiment,
        "running": running,
        "history": history,
        "next_share": experiment.next_share() if running else None,
        "needed": status.as_json()["sample_ratio"]["needed"],
        "text": {
            "traffic": status_text.traffic(experiment),
            "guards": status_text.guards(experiment),
            "lives": status_text.lives(experiment),
            "bears": status_text.bears(experiment),
        },
    }
