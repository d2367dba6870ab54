"""Runs: the list, and one training with its curves while it trains."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Path, Request, Response
from fastapi.responses import JSONResponse

from turret.server.routes import Here
from turret.server.state import ServerState
from turret.server.web import render
from turret.server.web.forms import pages

router = pages()
RunId = Annotated[str, Path(min_length=1, max_length=100)]
MOST = 200  # runs in the list
QUIET = 600.0  # seconds without a step after which a run may have been killed
DRAWN = ("step", "epoch", "loss", "lr", "tokens_per_second", "rss", "metrics", "split")


@router.get("/runs")
async def listing(request: Request, here: Here) -> Response:
    """The newest trainings."""
    found = await here.control(here.workspace.runs, MOST)
    return render.page(request, here, "runs.html.j2", runs=found, most=MOST)


@router.get("/runs/{run_id}")
async def show(request: Request, here: Here, run_id: RunId) -> Response:
    """One training: curves, recipe, metrics, timings, memory."""
    return render.page(request, here, "run.html.j2", **await _known(here, run_id))


@router.get("/runs/{run_id}/state")
async def state(request: Request, here: Here, run_id: RunId) -> Response:
    """How it is now: the live part of the page."""
    return render.page(request, here, "run_state.html.j2", **await _known(here, run_id))


@router.get("/runs/{run_id}/curve")
async def curve(here: Here, run_id: RunId) -> Response:
    """The steps so far, for the plots."""
    found = await here.control(here.workspace.curve, run_id, most=1000)
    steps = [{key: value for key, value in asdict(each).items() if key in DRAWN} for each in found]
    return JSONResponse({"steps": steps, "of": found[-1].steps if found else None})


async def _known(here: ServerState, run_id: str) -> dict[str, Any]:
    run = await here.control(here.workspace.run, run_id)
    steps = await here.control(here.workspace.curve, run_id, most=1)
    return {"run": run, "result": run["result"] or {}, "last": steps[-1] if steps else None, "quiet": _quiet(run)}


def _quiet(run: dict[str, Any]) -> bool:
    """Whether it says that it runs, and has made no step for long."""
    moment = datetime.fromisoformat(run["touched"] or run["created"])
    return run["state"] == "running" and (datetime.now(UTC) - moment).total_seconds() > QUIET
