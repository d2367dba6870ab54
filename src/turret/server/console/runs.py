"""The pages of runs: all trainings, and one with its curves while it trains."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Path, Request, Response
from fastapi.responses import JSONResponse

from turret.json_types import JsonMapping
from turret.server.console import render
from turret.server.console.forms import pages
from turret.server.routes import State
from turret.server.state import ServerState
from turret.tasks import main_metric, measure_of

router = pages()
RunId = Annotated[str, Path(min_length=1, max_length=100)]
MOST = 200  # runs in the list
STALLED_SECONDS = 600.0  # without a step: the run may have been killed
PLOTTED = ("step", "epoch", "loss", "lr", "tokens_per_second", "rss", "metrics", "split")


@router.get("/runs")
async def listing(request: Request, state: State) -> Response:
    """The newest trainings."""
    found = await state.control(state.workspace.runs, MOST)
    return render.page(request, state, "runs.html.j2", runs=found, most=MOST)


@router.get("/runs/{run_id}")
async def show(request: Request, state: State, run_id: RunId) -> Response:
    """One training: curves, recipe, metrics, timings, memory."""
    return render.page(request, state, "run.html.j2", **await _values(state, run_id))


@router.get("/runs/{run_id}/state")
async def show_state(request: Request, state: State, run_id: RunId) -> Response:
    """The live part of the page of a training."""
    return render.page(request, state, "run_state.html.j2", **await _values(state, run_id))


@router.get("/runs/{run_id}/curve")
async def curve(state: State, run_id: RunId) -> Response:
    """The steps so far, for the plots, and which metric is drawn."""
    found = await state.control(state.workspace.curve, run_id, most=1000)
    steps = [{key: value for key, value in asdict(each).items() if key in PLOTTED} for each in found]
    values = next((each.metrics for each in reversed(found) if each.metrics), {})
    key = main_metric(values)
    metric = None if key in (None, "loss") else {"key": key, "name": measure_of(key, values).name}
    return JSONResponse({"steps": steps, "of": found[-1].steps if found else None, "metric": metric})


async def _values(state: ServerState, run_id: str) -> render.Context:
    run = await state.control(state.workspace.run, run_id)
    steps = await state.control(state.workspace.curve, run_id, most=1)
    last = steps[-1] if steps else None
    place = await state.control(state.workspace.queue.place, run_id) if run["state"] == "waiting" else None
    return {"run": run, "result": run["result"] or {}, "last": last, "stalled": _is_stalled(run), "place": place}


def _is_stalled(run: JsonMapping) -> bool:
    """Whether the run counts as running but has made no step for a long time."""
    touched = datetime.fromisoformat(run["touched"] or run["created"])
    return run["state"] == "running" and (datetime.now(UTC) - touched).total_seconds() > STALLED_SECONDS
