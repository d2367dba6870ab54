"""Comparisons and sweeps under `/api/studies`: planned, queued for workers, shown with their cells, cancelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from turret.errors import BadRequest
from turret.json_types import JsonValue
from turret.recipe import Recipe
from turret.server import trainings
from turret.server.admin.runs import PlanRequest, encoded
from turret.server.routes import View, owner_of, router
from turret.server.trainings import CompareOptions, Study, StudyPlan, SweepOptions
from turret.store.jobs import StudyRow
from turret.store.runs import RunRow
from turret.workspace.orders import Order

control = router("admin")
StudyId = Annotated[str, Path(min_length=1, max_length=100, description="The `id` of a comparison or a sweep.")]
SHOWN = ConfigDict(
    json_schema_extra={
        "oneOf": [{"required": [key], "properties": {key: {"type": "object"}}} for key in ("compare", "sweep")]
    }
)


class StudyRequest(PlanRequest):
    """As in `turret compare RECIPE --on workers`, or `turret sweep RECIPE --on workers`: exactly one of the two."""

    model_config = SHOWN
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


@control.post("/api/studies/plan")
async def plan(body: StudyRequest, view: View, request: Request) -> StudyPlan:
    """What a comparison or a sweep would train, what it can decide, and how long it takes. Starts nothing."""
    return await view.preview(trainings.plan_study, view, *await _asked(body, view, request))


@control.post("/api/studies")
async def start(body: StudyRequest, view: View, request: Request) -> Study:
    """Put a comparison or a sweep into the queue. A `turret worker` of the same store conducts it."""
    return await view.control(trainings.submit_study, view, *await _asked(body, view, request))


async def _asked(body: StudyRequest, view: View, request: Request) -> tuple[str, Recipe, dict[str, bytes], Order]:
    """Who asks, and for what."""
    order = body.options().order()
    recipe = await view.parsing(Recipe.from_toml, body.recipe)
    return owner_of(request.state.caller), recipe, encoded(body.files), order


@control.get("/api/studies")
async def list_studies(view: View, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Studies:
    """The newest comparisons and sweeps that workers conduct, with their cells."""
    return Studies(studies=[trainings.shown(each) for each in await view.control(view.workspace.queue.studies, limit)])


@control.get("/api/studies/{study_id}")
async def show_study(study_id: StudyId, view: View) -> Study:
    """One, with the state, score and time of each cell."""
    return trainings.shown(await view.control(view.workspace.queue.study, study_id))


@control.post("/api/studies/{study_id}/cancel")
async def cancel_study(study_id: StudyId, view: View) -> Study:
    """End it and its cells: those that wait at once, those that run after their step. Versions stay."""
    return await _changed(view, view.workspace.queue.cancel, study_id)


@control.post("/api/studies/{study_id}/resume")
async def resume_study(study_id: StudyId, view: View) -> Study:
    """Put one that has failed or was cancelled back into the queue. Cells that have finished are not trained again."""
    return await _changed(view, view.workspace.queue.resume, study_id)


async def _changed(view: View, change: Callable[[str], RunRow | StudyRow], study_id: str) -> Study:
    await view.control(view.workspace.queue.study, study_id)  # raises NotFound for the id of a training
    row: JsonValue = await view.control(change, study_id)
    return trainings.shown(row)
