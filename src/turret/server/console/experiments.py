"""The pages of experiments: all of them, one with its evidence, and the dialogs that change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import Path, Request, Response
from fastapi.responses import JSONResponse

from turret.experiments.experiment import read_split
from turret.json_types import Plain
from turret.server.console import render
from turret.server.console.forms import Form, Sent, pages, require_verb
from turret.server.moves import end_experiment
from turret.server.routes import View

router = pages()
Name = Annotated[str, Path(min_length=1, max_length=200)]
Number = Annotated[int, Path(ge=1, lt=1 << 31)]
VERBS = ("ramp", "promote", "rollback", "stop")


@router.get("/experiments")
async def listing(request: Request, view: View) -> Response:
    """All experiments, the running ones first."""
    exists = await view.control(view.workspace.store.exists)
    found = await view.control(view.workspace.experiments) if exists else []
    found = sorted(found, key=lambda each: each["created"], reverse=True)
    found = sorted(found, key=lambda each: each["state"] != "running")
    return render.page(request, view, "experiments.html.j2", found=found)


@router.get("/experiments/{name}/{number}")
async def show(request: Request, view: View, name: Name, number: Number) -> Response:
    """One experiment."""
    return render.page(request, view, "experiment.html.j2", **await _values(view, name, number))


@router.get("/experiments/{name}/{number}/state")
async def show_state(request: Request, view: View, name: Name, number: Number) -> Response:
    """The live part of the page of an experiment."""
    return render.page(request, view, "experiment_state.html.j2", **await _values(view, name, number))


@router.get("/experiments/{name}/{number}/course")
async def course(view: View, name: Name, number: Number) -> Response:
    """The evidence after each outcome, for the plots."""
    found = await view.control(view.workspace.course, name, number)
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


def _drawn(against: Mapping[str, Plain]) -> Mapping[str, Plain]:
    """Without the tipping point, which a course does not compute."""
    return {key: value for key, value in against.items() if key != "missing"}


@router.get("/experiments/{name}/{number}/do/{verb}")
async def ask(request: Request, view: View, name: Name, number: Number, verb: str, arm: str | None = None) -> Response:
    """The dialog that confirms a change."""
    require_verb(verb, VERBS)
    values = await _values(view, name, number)
    candidates = [each for each in values["status"].analysis.arms if each.arm.role == "candidate" and each.arm.live]
    return render.page(request, view, "act.html.j2", **values, verb=verb, arm=arm, candidates=candidates)


@router.post("/experiments/{name}/{number}/do/{verb}")
async def act(request: Request, view: View, name: Name, number: Number, verb: str, form: Sent) -> Response:
    """Ramp, promote, roll back or stop."""
    require_verb(verb, VERBS)
    await _act(view, name, number, verb, form)
    await view.control(view.refresh)
    return render.redirect(request, f"/experiments/{name}/{number}")


async def _act(view: View, name: str, number: int, verb: str, form: Form) -> None:
    if verb == "ramp":
        experiment = view.workspace.experiment(name, number)
        await view.control(experiment.ramp, read_split(form.text("share")) if form.text("share") else None)
        return
    arm = form.text("arm") if verb == "promote" else None
    await end_experiment(view, name, number, promote=arm, rollback=verb == "rollback")


async def _values(view: View, name: str, number: int) -> render.Context:
    status = await view.control(view.workspace.experiment(name, number).status)
    from turret.experiments import status_text  # loads numpy, which the rest of the server does not need

    experiment, running = status.experiment, status.experiment.state == "running"
    history = [(each, status_text.event(each["verb"], each["detail"])) for each in reversed(status.analysis.history)]
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
