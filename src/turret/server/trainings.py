"""Drafts, plans, trainings, comparisons and sweeps of tables that clients send, for the control plane and the console.

All functions wait for the store or for another process: call them on a thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter

from turret.database import OPEN_STATES
from turret.json_types import JsonObject, JsonValue
from turret.recipe import Recipe
from turret.server.error_responses import without_paths
from turret.server.routes import WHOLE, Model, find_file
from turret.server.services import View
from turret.store import client_files
from turret.store.client_files import TABLE
from turret.store.jobs import StudyRow
from turret.store.runs import RunRow
from turret.tasks import main_metric
from turret.tasks.shapes import number_in
from turret.workspace.history import FullRun
from turret.workspace.inspecting import Inspection
from turret.workspace.progress import CellState
from turret.workspace.queueing import ComparisonRequest, Order, SentFiles, SweepOrder, as_spec

MOST_CURVES = 6  # in one plot
SENT = re.compile(f"({client_files.ID})(/.*)?")  # the source of a table that was sent before
INSPECTION = TypeAdapter(Inspection)


def draft(view: View, owner: str, source: str, files: Mapping[str, bytes], settings: Mapping[str, str]) -> Inspection:
    """The draft for a table that a client sends, or has sent before.

    Args:
        owner: whose files there are.
        files: name -> content of tables that are sent now.
        settings: of the recipe, that are known.
    """
    with _sent_tables(view, owner, source, files) as (found, tables):
        made = view.services.previews.draft(found, tables, settings)
    made["problem"] = None if made["problem"] is None else without_paths(made["problem"])
    return INSPECTION.validate_python(made)


# --- comparisons and sweeps -------------------------------------------------------------------------------------------

Budget = Annotated[float, Field(gt=0, le=30 * 86400)]
Part = Annotated[float, Field(gt=0, le=1)]
Values = Annotated[str, Field(min_length=1, max_length=1000)]
Seconds = Field(default=None, description="Seconds, after which no new cell begins; null: until all have run.")


class CompareOptions(Model):
    """As in `turret compare`."""

    methods: Annotated[str, Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Such as base,linear,full,lora:r=4/16; null: all that suit the task."
    )
    seeds: Annotated[int, Field(ge=1, le=100), WHOLE] = Field(5, description="Trainings of each method.")
    fractions: Annotated[list[Part], Field(min_length=1, max_length=10)] = Field(
        default_factory=lambda: [1.0], description="Sizes: shares of the training examples."
    )
    against: Annotated[str, Field(min_length=1, max_length=200)] = Field("full", description="The baseline.")
    margin: Annotated[float, Field(gt=0, le=50)] = Field(1.0, description="Points that still count as equally good.")
    lr: Annotated[float, Field(gt=0, le=10)] | Literal["auto"] | None = Field(
        None, description="One rate for all methods, or auto; null: each method's own."
    )
    texts: bool = Field(default=True, description="Whether the report shows examples.")
    budget: Budget | None = Seconds

    def order(self) -> Order:
        """For `turret.workspace.studying`."""
        return ComparisonRequest(**self.model_dump() | {"fractions": tuple(self.fractions)})


class SweepOptions(Model):
    """As in `turret sweep`."""

    settings: Annotated[dict[Annotated[str, Field(max_length=100)], Values], Field(min_length=1, max_length=20)] = (
        Field(description="Of method and train: a range 1e-4..1e-2, a list 4,8,16, or one value.")
    )
    trials: Annotated[int, Field(ge=1, le=500), WHOLE] | None = Field(
        None, description="Trainings at most; null: all combinations of lists, or 20 with a range."
    )
    at_once: Annotated[int, Field(ge=1, le=100), WHOLE] = Field(4, description="Trials that wait or run at a time.")
    budget: Budget | None = Seconds

    def order(self) -> Order:
        """For `turret.workspace.studying`."""
        return SweepOrder(**self.model_dump())


class PlanRow(BaseModel):
    title: str
    seconds: float | None = Field(description="Of one training, measured on this machine; null if nothing is trained.")
    refused: str | None


class StudyPlan(BaseModel):
    name: str
    cells: int = Field(description="Trainings and measurements.")
    missing: int = Field(description="Of these, how many have not run.")
    seconds: float | None = Field(description="Of all trainings, one after another; null if it is not known.")
    rows: list[PlanRow]
    said: list[str] = Field(description="Who judges, and what this design can decide.")


class Study(BaseModel):
    """A comparison or a sweep that workers conduct."""

    id: str
    verb: Literal["compare", "sweep"]
    name: str
    state: Literal["waiting", "running", "finished", "failed", "cancelled"]
    created: str
    ended: str | None
    who: str | None
    error: str | None
    source: str = Field(description="The data, as it was named.")
    options: JsonObject
    metric: str = Field(description="Of the scores; empty before the first cell.")
    planned: int | None = Field(description="Cells in all; null before the data is read.")
    cells: list[CellState]
    said: str | None = Field(description="The result in one sentence.")
    report: str | None = Field(description="The key of the report of a comparison.")
    version: str | None = Field(description="That the report says to keep, or of the best trial.")
    recipe: str | None = Field(description="TOML, of the best trial.")
    missing: int | None = Field(description="Cells that did not run, of one that has finished.")


def study_from_row(row: StudyRow) -> Study:
    """A study as a client sees it, from its row in the queue."""
    spec, found = row["spec"], row["result"] or {}
    error = None if row["error"] is None else without_paths(str(row["error"]))
    cells = []
    for each in found.get("cells", ()):
        why = None if each["error"] is None else without_paths(each["error"])
        left = row["state"] not in OPEN_STATES and each["state"] in OPEN_STATES
        cells.append(CellState(**each | {"error": why, "state": "cancelled" if left else each["state"]}))
    values: JsonObject = {key: row[key] for key in ("id", "name", "state", "created", "ended", "who")}
    values |= {key: found.get(key) for key in ("planned", "said", "report", "version", "recipe", "missing")}
    values |= {"verb": spec["verb"], "source": spec["sent"], "options": spec["order"]}
    return Study(**values, error=error, metric=found.get("metric", ""), cells=cells)


def plan_study(view: View, owner: str, recipe: Recipe, files: Mapping[str, bytes], order: Order) -> StudyPlan:
    """What a comparison or a sweep on such a table trains, and how long it takes."""
    study = as_spec(order, recipe.data.source)
    with _sent_data(view, owner, recipe, files) as (recipe, tables, own):
        found = StudyPlan(**view.services.previews.plan(view.workspace.store, recipe, tables, own, study))
    for row in found.rows:
        row.refused = row.refused and without_paths(row.refused)
    return found


def submit_study(view: View, owner: str, recipe: Recipe, files: Mapping[str, bytes], order: Order) -> Study:
    """Put a comparison or a sweep into the queue. Raises RecipeError for a setting that does not fit."""
    if isinstance(order, SweepOrder):
        from turret.workspace import sweeping  # imports numpy

        sweeping.split(order, recipe)
    study = as_spec(order, recipe.data.source)
    with _sent_data(view, owner, recipe, files) as (recipe, tables, own):
        row: JsonValue = view.workspace.queue.submit_sent(recipe, tables, own_base=own, study=study)
        return study_from_row(row)


# --- plans and trainings ----------------------------------------------------------------------------------------------


def plan(view: View, owner: str, recipe: Recipe, files: Mapping[str, bytes]) -> JsonObject:
    """The plan of a recipe for such a table: `recipe`, `plan`, `notes`, and the filled recipe as `toml`."""
    with _sent_data(view, owner, recipe, files) as (recipe, tables, own):
        return view.services.previews.plan(view.workspace.store, recipe, tables, own)


def submit(view: View, owner: str, recipe: Recipe, files: Mapping[str, bytes], priority: int = 0) -> RunRow | StudyRow:
    """Put a training on such a table into the queue. Returns the run."""
    with _sent_data(view, owner, recipe, files) as (recipe, tables, own):
        return view.workspace.queue.submit_sent(recipe, tables, priority=priority, own_base=own)


class CurvePoint(BaseModel):
    step: int
    loss: float
    held_out: float | None = Field(description="The metric of an evaluation at this step.")


class Curve(BaseModel):
    run: str
    name: str
    state: str
    metric: str | None = Field(description="Of `held_out`; null without an evaluation.")
    split: str | None
    steps: int | None = Field(description="In all.")
    points: list[CurvePoint] = Field(description="At most 1000, evenly spaced.")
    version: str | None


class Curves(BaseModel):
    curves: list[Curve]


def curves(view: View, runs: Sequence[str]) -> Curves:
    """The curves of several trainings. Raises NotFound."""
    return Curves(curves=[_curve(view, each) for each in dict.fromkeys(runs)])


def _curve(view: View, id: str) -> Curve:
    run, found = view.workspace.run(id), view.workspace.curve(id, most=1000)
    key = main_metric(next((each.metrics for each in reversed(found) if each.metrics), {}))
    chief = None if key == "loss" else key
    measured = [(each, None if chief is None else number_in(each.metrics or {}, chief)) for each in found]
    return Curve(
        run=id,
        name=run["name"],
        state=run["state"],
        metric=chief,
        split=next((each.split for each in reversed(found) if each.split), None),
        steps=found[-1].steps if found else None,
        points=[CurvePoint(step=each.step, loss=each.loss, held_out=value) for each, value in measured],
        version=(run["result"] or {}).get("version"),
    )


def log(view: View, run: FullRun | StudyRow, past: int = 0) -> Sequence[JsonObject]:
    """The lines of a run's worker, without paths of this machine; none of a run that was not queued.

    Args:
        run: or a study.
        past: the `id` of the last line that is known.
    """
    queued = run.get("queue", run) is not None
    found = view.workspace.queue.log(run["id"], past) if queued else []
    return [{**each, "line": without_paths(str(each["line"]))} for each in found]


@contextmanager
def _sent_data(
    view: View, owner: str, recipe: Recipe, files: Mapping[str, bytes]
) -> Iterator[tuple[Recipe, SentFiles, str | None]]:
    """The recipe with its tables; if it names a base of this server, with the id of that, and the id itself."""
    own = next((each.id for each in view.engines.bases if recipe.base in (each.name, each.id)), None)
    recipe = recipe if own is None else recipe.model_copy(update={"base": own})
    with _sent_tables(view, owner, recipe.data.source, files) as (source, tables):
        yield recipe.changed(data={"source": source}), tables, own


@contextmanager
def _sent_tables(view: View, owner: str, source: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, SentFiles]]:
    """The tables of a client by name, and the source among them. One that was sent before is `ID/NAME`.

    Raises:
        NotFound: the sender has no such file.
    """
    found = SENT.fullmatch(source)
    if found is None or source in files:
        yield source, files
        return
    file = find_file(view, owner, found[1], TABLE)
    with view.services.files.content(file) as path:
        named = f"{file.id}/{file.name}"
        yield named, {named: path}
