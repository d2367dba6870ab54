"""Trainings under `/api/runs`: put into the queue, listed, shown with their log, cancelled, deleted."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query
from pydantic import BaseModel, Field

from turret.json_types import JsonObject
from turret.recipe import Recipe
from turret.server.error_responses import without_paths
from turret.server.routes import State, router
from turret.server.schemas import WHOLE, Model

control = router("admin")
MOST_FILES = 16
RunId = Annotated[str, Path(min_length=1, max_length=100, description="The `id` of a run.")]
FileName = Annotated[str, Field(min_length=1, max_length=100)]


class TrainRequest(Model):
    """As in `turret train RECIPE --queue`."""

    recipe: Annotated[str, Field(min_length=1, max_length=100_000)] = Field(description="A recipe, as TOML.")
    files: Annotated[dict[FileName, str], Field(max_length=MOST_FILES)] = Field(
        default_factory=dict,
        description="Tables by name; `data.source` names one. Without it: a Hub id, or pypi:package.",
    )
    priority: Annotated[int, Field(ge=-100, le=100), WHOLE] = Field(
        0, description="Among the trainings of the same tenant; higher is earlier."
    )


class Runs(BaseModel):
    runs: list[JsonObject] = Field(description="Newest first; `queue` is null for a training that was not queued.")


@control.post("/api/runs")
async def train(body: TrainRequest, state: State) -> JsonObject:
    """Put a training into the queue. A `turret worker` of the same store takes it."""
    recipe, files = (
        await state.parsing(Recipe.from_toml, body.recipe),
        {name: text.encode() for name, text in body.files.items()},
    )
    own = next((each.id for each in state.engines.bases if recipe.base in (each.name, each.id)), None)
    if own is not None:
        recipe = recipe.model_copy(update={"base": own})
    submit = state.workspace.queue.submit_texts
    return _shown(await state.control(submit, recipe, files, priority=body.priority, own_base=own))


@control.get("/api/runs")
async def list_runs(state: State, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Runs:
    """The newest trainings, those that wait too."""
    return Runs(runs=[_shown(each) for each in await state.control(state.workspace.runs, limit)])


@control.get("/api/runs/{run_id}")
async def show_run(
    run_id: RunId,
    state: State,
    past: Annotated[int, Query(ge=0, le=1 << 62, description="The `id` of the last line that is known.")] = 0,
) -> JsonObject:
    """One training, with its recipe, and the `log` of its worker."""
    run = await state.control(state.workspace.run, run_id)
    log = [] if run["queue"] is None else await state.control(state.workspace.queue.log, run_id, past)
    place = await state.control(state.workspace.queue.place, run_id) if run["state"] == "waiting" else None
    queued = None if place is None else {"place": place[0], "of": place[1]}
    lines = [{**each, "line": without_paths(str(each["line"]))} for each in log]
    return _shown(run) | {"log": lines, "place": queued}


@control.post("/api/runs/{run_id}/cancel")
async def cancel_run(run_id: RunId, state: State) -> JsonObject:
    """End a training of the queue: at once if it waits, after its step if it runs."""
    return _shown(await state.control(state.workspace.queue.cancel, run_id))


@control.delete("/api/runs/{run_id}")
async def delete_run(run_id: RunId, state: State) -> JsonObject:
    """Delete a training that has ended, with its curve, checkpoint and log. Its version stays."""
    await state.control(state.workspace.queue.delete, run_id)
    return {"deleted": run_id}


def _shown(run: JsonObject) -> JsonObject:
    return run if run["error"] is None else {**run, "error": without_paths(str(run["error"]))}
