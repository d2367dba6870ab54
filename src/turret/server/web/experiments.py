"""Experiments: the list, and one with its evidence over time, what to do next, and the buttons that do it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Request, Response
from fastapi.responses import JSONResponse

from turret.errors import NotFound
from turret.experiments.experiment import read_split
from turret.server.experiments import end
from turret.server.routes import Here
from turret.server.state import ServerState
from turret.server.web import render
from turret.server.web.adapters import gone
from turret.server.web.forms import Form, Sent, pages

router = pages()
Name = Annotated[str, Path(min_length=1, max_length=200)]
Number = Annotated[int, Path(ge=1, lt=1 << 31)]
VERBS = ("ramp", "promote", "rollback", "stop")


@router.get("/experiments")
async def listing(request: Request, here: Here) -> Response:
    """Every experiment, the running ones first."""
    there = await here.control(here.workspace.store.exists)
    found = await here.control(here.workspace.experiments) if there else []
    found = sorted(found, key=lambda each: each["created"], reverse=True)
    found = sorted(found, key=lambda each: each["state"] != "running")
    return render.page(request, here, "experiments.html.j2", found=found)


@router.get("/experiments/{name}/{number}")
async def show(request: Request, here: Here, name: Name, number: Number) -> Response:
    """One experiment."""
    return render.page(request, here, "experiment.html.j2", **await _known(here, name, number))


@router.get("/experiments/{name}/{number}/state")
async def state(request: Request, here: Here, name: Name, number: Number) -> Response:
    """How it is now: the live part of the page."""
    return render.page(request, here, "experiment_state.html.j2", **await _known(here, name, number))


@router.get("/experiments/{name}/{number}/course")
async def course(here: Here, name: Name, number: Number) -> Response:
    """How the evidence grew, for the plots."""
    found = await here.control(here.workspace.course, name, number)
    points = [
        {
            "outcomes": each.outcomes,
            "at": each.at,
            "means": each.means,
            "against": {arm: one.as_json() for arm, one in each.against.items()},
        }
        for each in found.points
    ]
    return JSONResponse({"points": points})


@router.get("/experiments/{name}/{number}/do/{verb}")
async def ask(
    request: Request, here: Here, name: Name, number: Number, verb: str, arm: str | None = None
) -> Response:  # fmt: skip
    """What a verb would do, and the button that does it."""
    if verb not in VERBS:
        raise NotFound(f"no verb {ascii(verb)[:40]}: expected one of {', '.join(VERBS)}")
    values = await _known(here, name, number)
    candidates = [each for each in values["status"].weighed.arms if each.arm.role == "candidate" and each.arm.live]
    return render.page(request, here, "act.html.j2", **values, verb=verb, arm=arm, candidates=candidates)


@router.post("/experiments/{name}/{number}/do/{verb}")
async def act(request: Request, here: Here, name: Name, number: Number, verb: str, form: Sent) -> Response:
    """Ramp, promote, roll back or stop; what refuses is told in the page."""
    if verb not in VERBS:
        raise NotFound(f"no verb {ascii(verb)[:40]}: expected one of {', '.join(VERBS)}")
    await _carried_out(here, name, number, verb, form)
    await here.control(here.look)
    return gone(request, f"/experiments/{name}/{number}")


async def _carried_out(here: ServerState, name: str, number: int, verb: str, form: Form) -> None:
    if verb == "ramp":
        live = here.workspace.experiment(name, number)
        await here.control(live.ramp, read_split(form.text("share")) if form.text("share") else None)
        return
    arm = form.text("arm") if verb == "promote" else None
    await end(here, name, number, promote=arm, rollback=verb == "rollback")


async def _known(here: ServerState, name: str, number: int) -> dict[str, Any]:
    status = await here.control(here.workspace.experiment(name, number).status)
    from turret.experiments import status_text  # with numpy, which whoever asks no experiment need not wait for

    experiment = status.experiment
    said = {
        "traffic": status_text.traffic(experiment),
        "guards": status_text.guards(experiment),
        "lives": status_text.lives(experiment),
    }
    history = [
        (each, status_text.event(each["verb"], dict(each["detail"]))) for each in reversed(status.weighed.history)
    ]
    ramp = experiment.next_share() if experiment.state == "running" else None
    needed = status.as_json()["sample_ratio"]["needed"]
    values = {"history": history, "next_share": ramp, "needed": needed, "said": said}
    return {"status": status, "experiment": experiment, "running": experiment.state == "running", **values}
