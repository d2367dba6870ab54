"""Trainings under `/api/runs`, comparisons and sweeps under `/api/studies`: planned, queued, shown, cancelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from turret.compare.results import RunReport
from turret.errors import BadRequest
from turret.json_types import JsonObject, JsonValue
from turret.recipe import Recipe
from turret.server import trainings
from turret.server.error_responses import without_paths
from turret.server.routes import WHOLE, Model, Owner, View, router
from turret.server.trainings import CompareOptions, Curves, Study, StudyPlan, SweepOptions
from turret.store.jobs import StudyRow
from turret.store.runs import RunRow
from turret.workspace.inspecting import Inspection
from turret.workspace.queueing import Order

control = router("admin")
MOST_FILES, MOST_SETTINGS = 16, 64
RunId = Annotated[str, Path(min_length=1, max_length=100, description="The `id` of a run.")]
RunKey = Annotated[str, Field(min_length=1, max_length=100)]
FileName = Annotated[str, Field(min_length=1, max_length=100)]


Texts = Annotated[dict[FileName, str], Field(max_length=MOST_FILES)]
SettingName = Annotated[str, Field(min_length=1, max_length=200)]
Plain = Annotated[str, Field(max_length=10_000)]
TABLES = (
    "Tables by name; `data.source` names one. Without it: the id of a file of `/v1/files`, a Hub id, or pypi:package."
)


class DraftRequest(Model):
    """As in `turret init DATA`."""

    source: Annotated[str, Field(min_length=1, max_length=500)] = Field(
        description="The id of a file of `/v1/files`, one of `files`, or pypi:package."
    )
    files: Texts = Field(default_factory=dict, description="Tables by name.")
    settings: Annotated[dict[SettingName, Plain], Field(max_length=MOST_SETTINGS)] = Field(
        default_factory=dict, description="Settings of the recipe that are known, such as `data.text` or `task.kind`."
    )


class PlanRequest(Model):
    """As in `turret plan RECIPE`."""

    recipe: Annotated[str, Field(min_length=1, max_length=100_000)] = Field(description="A recipe, as TOML.")
    files: Texts = Field(default_factory=dict, description=TABLES)


class TrainRequest(PlanRequest):
    """As in `turret train RECIPE --queue`."""

    priority: Annotated[int, Field(ge=-100, le=100), WHOLE] = Field(
        0, description="Among the trainings of the same tenant; higher is earlier."
    )


class Runs(BaseModel):
    runs: list[JsonObject] = Field(description="Newest first; `queue` is null for a training that was not queued.")


@control.post("/api/runs/draft")
async def draft(body: DraftRequest, view: View, owner: Owner) -> Inspection:
    """Look at a table: its first rows, the task and the columns that they show, and a recipe for them."""
    return await view.preview(trainings.draft, view, owner, body.source, encode_tables(body.files), body.settings)


@control.post("/api/runs/plan")
async def plan(body: PlanRequest, view: View, owner: Owner) -> JsonObject:
    """Check a training without starting it: memory, time and what is wrong, on the machine of this server.

    `toml` is the recipe with every default filled in. The worker that takes the training plans it again.
    """
    recipe = await view.parsing(Recipe.from_toml, body.recipe)
    return await view.preview(trainings.plan, view, owner, recipe, encode_tables(body.files))


@control.post("/api/runs")
async def train(body: TrainRequest, view: View, owner: Owner) -> JsonObject:
    """Put a training into the queue. A `turret worker` of the same store takes it."""
    recipe = await view.parsing(Recipe.from_toml, body.recipe)
    files = encode_tables(body.files)
    return _run_json(await view.control(trainings.submit, view, owner, recipe, files, body.priority))


def encode_tables(files: Mapping[str, str]) -> dict[str, bytes]:
    """Tables in a request, as bytes."""
    return {name: text.encode() for name, text in files.items()}


@control.get("/api/runs")
async def list_runs(view: View, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Runs:
    """The newest trainings, those that wait too."""
    return Runs(runs=[_run_json(each) for each in await view.control(view.workspace.runs, limit)])


@control.get("/api/curves")
async def show_curves(view: View, run: Annotated[list[RunKey], Query(max_length=trainings.MOST_CURVES)]) -> Curves:
    """The loss of each step and the metric of each evaluation, of several trainings."""
    return await view.control(trainings.curves, view, run)


@control.get("/api/runs/{run_id}")
async def show_run(
    run_id: RunId,
    view: View,
    past: Annotated[int, Query(ge=0, le=1 << 62, description="The `id` of the last line that is known.")] = 0,
) -> JsonObject:
    """One training, with its recipe, and the `log` of its worker."""
    run = await view.control(view.workspace.run, run_id)
    log = await view.control(trainings.log, view, run, past)
    place = await view.control(view.workspace.queue.place, run_id) if run["state"] == "waiting" else None
    queued = None if place is None else {"place": place[0], "of": place[1]}
    return _run_json(run) | {"log": log, "place": queued}


@control.get("/api/runs/{run_id}/report")
async def show_report(run_id: RunId, view: View) -> RunReport:
    """What its version got right and wrong on its held-out examples: confusions, reliability, the worst mistakes."""
    return await view.control(view.workspace.run_report, run_id)


@control.post("/api/runs/{run_id}/cancel")
async def cancel_run(run_id: RunId, view: View) -> JsonObject:
    """End a training of the queue: at once if it waits, after its step if it runs."""
    return _run_json(await view.control(view.workspace.queue.cancel, run_id))


@control.post("/api/runs/{run_id}/resume")
async def resume_run(run_id: RunId, view: View) -> JsonObject:
    """Put a training that has failed or was cancelled back into the queue. It resumes from its last checkpoint."""
    return _run_json(await view.control(view.workspace.queue.resume, run_id))


@control.delete("/api/runs/{run_id}")
async def delete_run(run_id: RunId, view: View) -> JsonObject:
    """Delete a training that has ended, with its curve, checkpoint and log. Its version stays."""
    await view.control(view.workspace.queue.delete, run_id)
    return {"deleted": run_id}


def _run_json(run: RunRow | StudyRow) -> JsonObject:
    return {**run, "error": None if run["error"] is None else without_paths(str(run["error"]))}


# --- studies ----------------------------------------------------------------------------------------------------------
# Comparisons and sweeps under `/api/studies`: planned, queued for workers, shown with their cells, cancelled.


StudyId = Annotated[str, Path(min_length=1, max_length=100, description="The `id` of a comparison or a sweep.")]
EITHER = ConfigDict(
    json_schema_extra={
        "oneOf": [{"required": [key], "properties": {key: {"type": "object"}}} for key in ("compare", "sweep")]
    }
)


class StudyRequest(PlanRequest):
    """As in `turret compare RECIPE --on workers`, or `turret sweep RECIPE --on workers`: exactly one of the two."""

    model_config = EITHER
    compare: CompareOptions | None = None
    sweep: SweepOptions | None = None

    def options(self) -> CompareOptions | SweepOptions:
        """Those that were given. Raises BadRequest."""
        given = [each for each in (self.compare, self.sweep) if each is not None]
        if len(given) != 1:
            raise BadRequest("expected compare or sweep, and not both: give the options of one, or {}")
        return given[0]


class Studies(BaseModel):
    studies: list[Study] = Field(description="Newest first.")


@control.post("/api/studies/plan", name="plan")
async def plan_study(body: StudyRequest, view: View, owner: Owner) -> StudyPlan:
    """What a comparison or a sweep would train, what it can decide, and how long it takes. Starts nothing."""
    return await view.preview(trainings.plan_study, view, *await _study_arguments(body, view, owner))


@control.post("/api/studies", name="start")
async def start_study(body: StudyRequest, view: View, owner: Owner) -> Study:
    """Put a comparison or a sweep into the queue. A `turret worker` of the same store conducts it."""
    return await view.control(trainings.submit_study, view, *await _study_arguments(body, view, owner))


async def _study_arguments(body: StudyRequest, view: View, owner: Owner) -> tuple[str, Recipe, dict[str, bytes], Order]:
    """Who asks, and for what."""
    order = body.options().order()
    recipe = await view.parsing(Recipe.from_toml, body.recipe)
    return owner, recipe, encode_tables(body.files), order


@control.get("/api/studies")
async def list_studies(view: View, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Studies:
    """The newest comparisons and sweeps that workers conduct, with their cells."""
    return Studies(
        studies=[trainings.study_from_row(each) for each in await view.control(view.workspace.queue.studies, limit)]
    )


@control.get("/api/studies/{study_id}")
async def show_study(study_id: StudyId, view: View) -> Study:
    """One, with the state, score and time of each cell."""
    return trainings.study_from_row(await view.control(view.workspace.queue.study, study_id))


@control.post("/api/studies/{study_id}/cancel")
async def cancel_study(study_id: StudyId, view: View) -> Study:
    """End it and its cells: those that wait at once, those that run after their step. Versions stay."""
    return await _change_study(view, view.workspace.queue.cancel, study_id)


@control.post("/api/studies/{study_id}/resume")
async def resume_study(study_id: StudyId, view: View) -> Study:
    """Put one that has failed or was cancelled back into the queue. Cells that have finished are not trained again."""
    return await _change_study(view, view.workspace.queue.resume, study_id)


async def _change_study(view: View, change: Callable[[str], RunRow | StudyRow], study_id: str) -> Study:
    await view.control(view.workspace.queue.study, study_id)  # raises NotFound for the id of a training
    row: JsonValue = await view.control(change, study_id)
    return trainings.study_from_row(row)
