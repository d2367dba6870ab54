"""The pages of runs: all trainings, and one with its curves and its log while it trains."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import StringConstraints

from turret.server import trainings
from turret.server.console import render
from turret.server.console.forms import pages, require_verb
from turret.server.routes import View
from turret.tasks import main_metric, measure_of
from turret.workspace.training_runs import FullRun

router = pages()
RunKey = Annotated[str, StringConstraints(min_length=1, max_length=100)]
RunId = Annotated[str, Path(min_length=1, max_length=100)]
Runs = Annotated[list[RunKey], Query(min_length=1, max_length=trainings.MOST_CURVES)]
Past = Annotated[int, Query(ge=0, le=1 << 62)]
VERBS = ("cancel", "resume", "delete")
MOST = 200  # runs in the list
MOST_LINES = 200  # of the log
STALLED_SECONDS = 600.0  # without a step: the run may have been killed
PLOTTED = ("step", "epoch", "loss", "lr", "tokens_per_second", "rss", "metrics", "split")


@router.get("/runs")
async def listing(request: Request, view: View) -> Response:
    """The newest trainings."""
    found = await view.control(view.workspace.runs, MOST)
    return render.page(request, view, "runs.html.j2", runs=found, most=MOST)


@router.get("/runs/overlay")
async def overlay(request: Request, view: View, run: Runs) -> Response:
    """The curves of several trainings in one plot, and their final values in a table."""
    found = await view.control(trainings.curves, view, run)
    return render.page(request, view, "runs_overlay.html.j2", curves=found.curves)


@router.get("/runs/overlay/curves")
async def overlay_curves(view: View, run: Runs) -> trainings.Curves:
    """The same, for the plots."""
    return await view.control(trainings.curves, view, run)


@router.get("/runs/{run_id}")
async def show(request: Request, view: View, run_id: RunId) -> Response:
    """One training: curves, recipe, metrics, timings, memory."""
    values = await _values(view, run_id)
    return render.page(request, view, "run.html.j2", **values, **await _log(view, values["run"]))


@router.get("/runs/{run_id}/state")
async def show_state(request: Request, view: View, run_id: RunId) -> Response:
    """The live part of the page of a training."""
    return render.page(request, view, "run_state.html.j2", **await _values(view, run_id))


@router.get("/runs/{run_id}/log")
async def show_log(request: Request, view: View, run_id: RunId, past: Past = 0) -> Response:
    """The log of a training, if it has a line after `past` or no more will come; else 204."""
    run = await view.control(view.workspace.run, run_id)
    values = await _log(view, run)
    if values["more"] and values["newest"] <= past:
        return Response(status_code=204)
    return render.page(request, view, "run_log.html.j2", run=run, **values)


@router.get("/runs/{run_id}/do/{verb}")
async def ask(request: Request, view: View, run_id: RunId, verb: str) -> Response:
    """The dialog that confirms a change."""
    require_verb(verb, VERBS)
    return render.page(request, view, "run_act.html.j2", run=await view.control(view.workspace.run, run_id), verb=verb)


@router.post("/runs/{run_id}/do/{verb}")
async def act(request: Request, view: View, run_id: RunId, verb: str) -> Response:
    """Cancel a training, let an ended one go on, or delete it."""
    require_verb(verb, VERBS)
    queue = view.workspace.queue
    await view.control({"cancel": queue.cancel, "resume": queue.resume, "delete": queue.delete}[verb], run_id)
    return render.redirect(request, "/runs" if verb == "delete" else f"/runs/{run_id}")


@router.get("/runs/{run_id}/curve")
async def curve(view: View, run_id: RunId) -> Response:
    """The steps so far, for the plots, and which metric is drawn."""
    found = await view.control(view.workspace.curve, run_id, most=1000)
    steps = [{key: value for key, value in asdict(each).items() if key in PLOTTED} for each in found]
    values = next((each.metrics for each in reversed(found) if each.metrics), {})
    key = main_metric(values)
    metric = None if key in (None, "loss") else {"key": key, "name": measure_of(key, values).name}
    return JSONResponse({"steps": steps, "of": found[-1].steps if found else None, "metric": metric})


async def _values(view: View, run_id: str) -> render.Context:
    run = await view.control(view.workspace.run, run_id)
    steps = await view.control(view.workspace.curve, run_id, most=1)
    last = steps[-1] if steps else None
    place = await view.control(view.workspace.queue.place, run_id) if run["state"] == "waiting" else None
    return {"run": run, "result": run["result"] or {}, "last": last, "stalled": _is_stalled(run), "place": place}


async def _log(view: View, run: FullRun) -> render.Context:
    """The newest lines of a queued run, the newest first."""
    lines = await view.control(trainings.log, view, run)
    return {
        "lines": lines[: -MOST_LINES - 1 : -1],
        "newest": lines[-1]["id"] if lines else 0,
        "more": run["queue"] is not None and run["state"] in ("running", "waiting"),
    }


def _is_stalled(run: FullRun) -> bool:
    """Whether the run counts as running but has made no step for a long time."""
    touched = datetime.fromisoformat(run["touched"] or run["created"])
    return run["state"] == "running" and (datetime.now(UTC) - touched).total_seconds() > STALLED_SECONDS
