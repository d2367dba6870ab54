"""The pages of trainings, comparisons and sweeps: from a table to a start, and what became of each.

A person chooses a table, corrects what it shows, reads the plan, and starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import Path, Query, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import StringConstraints

from turret.data import source as tables
from turret.database import OPEN_STATES
from turret.errors import BadRequest, NotFound, TurretError
from turret.methods import METHODS
from turret.methods import SHOWN as METHODS_SHOWN
from turret.recipe import AUTO, Recipe, toml_text
from turret.server import trainings
from turret.server.console import render
from turret.server.console.render import Field, Form, Page, Sent, model_in, one_of, pages
from turret.server.routes import FileId, View, keep
from turret.store.client_files import TABLE
from turret.tasks import TASKS, Task, main_metric, measure_of
from turret.workspace.history import FullRun
from turret.workspace.inspecting import Inspection

router = pages()
USUAL = next(iter(METHODS_SHOWN))  # method
MOST = 50  # tables in the list
SECTIONS = ("data", "task", "train")  # of a recipe, whose keys a form may set
STEPS = {  # what a table is for -> the path of the next step, and the words of its button
    "plan": ("/train/plan", "Check the plan"),
    "compare": ("/comparisons/start/compare", "Compare methods"),
    "sweep": ("/comparisons/start/sweep", "Search settings"),
}
Source = Annotated[str, Query(min_length=1, max_length=500)]
Then = Literal["plan", "compare", "sweep"]


@router.get("/train")
async def show(page: Page, then: Then = "plan") -> Response:
    """The form for a table, and the tables that were sent before."""
    return await _start(page, then)


@router.post("/train")
async def upload(page: Page, view: View, form: Sent) -> Response:
    """Store a table, and go on to what it shows."""
    if form.file is None:
        raise BadRequest("no file is chosen: choose a table")
    kept = await keep(view, page.owner, form.file, TABLE)
    then = _then(form)
    return page.redirect(f"/train/recipe?source={kept.id}" + ("" if then == "plan" else f"&then={then}"))


@router.get("/train/tables/{file_id}/delete")
async def ask(page: Page, view: View, file_id: FileId, then: Then = "plan") -> Response:
    """The dialog that confirms the end of a table."""
    found = await view.control(view.services.files.find, page.owner, file_id)
    return page.show("train_table_act.html.j2", file=found, then=then)


@router.post("/train/tables/{file_id}/delete")
async def delete_table(page: Page, view: View, file_id: FileId, form: Sent) -> Response:
    """Delete a table that was sent."""
    await view.control(view.services.files.delete, page.owner, file_id)
    then = _then(form)
    return page.redirect("/train" if then == "plan" else f"/train?then={then}")


def _then(form: Form) -> str:
    """The step after the table: a key of STEPS."""
    return form.text("then") if form.text("then") in STEPS else "plan"


async def _start(page: Page, then: str, error: TurretError | None = None, source: str = "") -> Response:
    found = await page.view.control(page.view.services.files.list_files, page.owner, purpose=TABLE, limit=MOST)
    values = {"found": found, "formats": tables.SUFFIXES, "most": page.view.services.limits.file_bytes}
    values |= {"then": then, "here": "train" if then == "plan" else "comparisons"}
    return page.show("train.html.j2", error=error, form=Form({"source": source}), **values)


# --- what a table shows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """What a person has chosen for a table so far.

    Args:
        settings: of the recipe, by key; without those that are left to the guess.
        method: a key of the methods that are shown.
        then: the next step, of STEPS.
    """

    source: str
    settings: Mapping[str, str | list[str]] = field(default_factory=dict)
    method: str = USUAL
    then: str = "plan"

    @classmethod
    def of(cls, form: Form) -> Chosen:
        """The choices in a form. Columns that were guessed for another task are left out."""
        found: dict[str, str | list[str]] = {}
        other = form.text("task.kind") != form.text("guessed")
        for key in form:
            section, _, rest = key.partition(".")
            values = [each for each in map(str.strip, form.all(key)) if each]
            column = section == "data" and rest in _roles()
            if values and (section in SECTIONS or key in ("name", "base")) and not (column and other):
                found[key] = values[0] if len(values) == 1 else values
        return cls(form.text("source"), found, form.text("method") or USUAL, _then(form))

    def as_settings(self) -> dict[str, str]:
        """For `turret.workspace.drafting`."""
        kind, _, name = self.method.partition(":")
        found = {key: each if isinstance(each, str) else toml_text(each) for key, each in self.settings.items()}
        named_by = METHODS[kind].named_by if kind in METHODS else None
        return found | {"method.kind": kind} | ({f"method.{named_by}": name} if name and named_by else {})


def _roles() -> frozenset[str]:
    return frozenset(role for task in TASKS.values() for role in task.schema().roles)


@router.get("/train/recipe")
async def look(page: Page, source: Source, then: Then = "plan") -> Response:
    """What a table shows, with a form to correct it."""
    return await _look(page, Chosen(source, then=then))


@router.post("/train/recipe")
async def look_again(page: Page, form: Sent) -> Response:
    """The same, with what was corrected."""
    return await _look(page, Chosen.of(form), form)


async def _look(page: Page, chosen: Chosen, form: Form | None = None, error: TurretError | None = None) -> Response:
    try:
        made = await _draft_recipe(page, chosen if error is None else Chosen(chosen.source))
    except TurretError as wrong:
        if error is None and chosen.settings:  # one of them does not fit
            return await _look(page, chosen, form, wrong)
        return await _start(page, chosen.then, wrong, chosen.source)
    kind = str(chosen.settings.get("task.kind") or (made.guess.kind if made.guess else ""))
    task = TASKS.get(kind)
    values = {
        "chosen": chosen,
        "made": made,
        "problem": made.problem,
        "kind": kind,
        "kinds": list(TASKS),
        "schema": None if task is None else task.schema(),
        "base": chosen.settings.get("base") or _base_for(page.view, task),
        "suggested": [AUTO, *(each.name for each in page.view.engines.bases)],
        "methods": METHODS_SHOWN,
        "steps": {chosen.then: STEPS[chosen.then]} | STEPS,
    }
    return page.show("train_recipe.html.j2", error=error, form=form if error else None, **values)


async def _draft_recipe(page: Page, chosen: Chosen) -> Inspection:
    return await page.view.preview(trainings.draft, page.view, page.owner, chosen.source, {}, chosen.as_settings())


def _base_for(view: View, task: type[Task] | None) -> str:
    """A base of this server that can learn the task, so that this server answers with what is trained."""
    able = (each.name for each in view.engines.bases if task and task.head in each.engine.base.family.head_kinds)
    return next(able, AUTO)


# --- the plan, and the start ------------------------------------------------------------------------------------------


@router.post("/train/plan")
async def plan(page: Page, view: View, form: Sent) -> Response:
    """Plan the recipe in the form. Without one, a recipe is drafted from what is chosen for a table."""
    text, source = await recipe_in(page, form), form.text("source")
    if isinstance(text, Response):
        return text
    try:
        recipe = await view.parsing(Recipe.from_toml, text)
        planned = await view.preview(trainings.plan, view, page.owner, recipe, {})
    except TurretError as error:
        return page.show("train_plan.html.j2", error=error, text=text, source=source, planned=None)
    return page.show("train_plan.html.j2", text=text, source=source, planned=planned)


async def recipe_in(page: Page, form: Form) -> str | Response:
    """The recipe in a form. Without one, a draft for the chosen table; if no draft can be made, the table's page."""
    if text := form.raw("recipe"):
        return text
    chosen = Chosen.of(form)
    try:
        made = await _draft_recipe(page, chosen)
    except TurretError as error:
        return await _look(page, chosen, form, error)
    return made.recipe or await _look(page, chosen)


@router.post("/train/start")
async def start(page: Page, view: View, form: Sent) -> Response:
    """Put the training into the queue, and go to its page."""
    text = form.raw("recipe")
    try:
        recipe = await view.parsing(Recipe.from_toml, text)
        run = await view.control(trainings.submit, view, page.owner, recipe, {})
    except TurretError as error:
        return page.show("train_plan.html.j2", error=error, text=text, source=form.text("source"), planned=None)
    return page.redirect(f"/runs/{run['id']}")


# --- runs -------------------------------------------------------------------------------------------------------------
# The pages of runs: all trainings, and one with its curves and its log while it trains.


RunKey = Annotated[str, StringConstraints(min_length=1, max_length=100)]
RunId = Annotated[str, Path(min_length=1, max_length=100)]
Runs = Annotated[list[RunKey], Query(min_length=1, max_length=trainings.MOST_CURVES)]
Ticked = Annotated[list[RunKey], Query(default_factory=list)]
Past = Annotated[int, Query(ge=0, le=1 << 62)]
RunVerb = Annotated[str, one_of("cancel", "resume", "delete")]
MOST_RUNS = 200  # runs in the list
MOST_LINES = 200  # of the log
STALLED_SECONDS = 600.0  # without a step: the run may have been killed
PLOTTED = ("step", "epoch", "loss", "lr", "tokens_per_second", "rss", "metrics", "split")


@router.get("/runs")
async def list_runs(page: Page, view: View) -> Response:
    """The newest trainings."""
    return page.show("runs.html.j2", runs=await view.control(view.workspace.runs, MOST_RUNS), most=MOST_RUNS)


@router.get("/runs/overlay")
async def overlay(page: Page, view: View, run: Ticked) -> Response:
    """The curves of several trainings in one plot, and their final values in a table."""
    if not 1 <= len(run) <= trainings.MOST_CURVES:
        error = BadRequest(f"{len(run)} runs are chosen: expected 1 to {trainings.MOST_CURVES}")
        runs, form = await view.control(view.workspace.runs, MOST_RUNS), Form(page.request.query_params)
        return page.show("runs.html.j2", error=error, form=form, runs=runs, most=MOST_RUNS)
    found = await view.control(trainings.curves, view, run)
    return page.show("runs_overlay.html.j2", curves=found.curves)


@router.get("/runs/overlay/curves")
async def overlay_curves(view: View, run: Runs) -> trainings.Curves:
    """The same, for the plots."""
    return await view.control(trainings.curves, view, run)


@router.get("/runs/{run_id}")
async def show_run(page: Page, view: View, run_id: RunId) -> Response:
    """One training: curves, recipe, metrics, timings, memory."""
    values = await _run_values(view, run_id)
    return page.show("run.html.j2", **values, **await _log(view, values["run"]))


@router.get("/runs/{run_id}/state")
async def show_run_state(page: Page, view: View, run_id: RunId) -> Response:
    """The live part of the page of a training."""
    return page.show("run_state.html.j2", **await _run_values(view, run_id))


@router.get("/runs/{run_id}/log")
async def show_log(page: Page, view: View, run_id: RunId, past: Past = 0) -> Response:
    """The log of a training, if it has a line after `past` or no more will come; else 204."""
    run = await view.control(view.workspace.run, run_id)
    values = await _log(view, run)
    if values["more"] and values["newest"] <= past:
        return Response(status_code=204)
    return page.show("run_log.html.j2", run=run, **values)


@router.get("/runs/{run_id}/do/{verb}")
async def ask_about_run(page: Page, view: View, run_id: RunId, verb: RunVerb) -> Response:
    """The dialog that confirms a change."""
    return page.show("run_act.html.j2", run=await view.control(view.workspace.run, run_id), verb=verb)


@router.post("/runs/{run_id}/do/{verb}")
async def act_on_run(page: Page, view: View, run_id: RunId, verb: RunVerb) -> Response:
    """Cancel a training, let an ended one go on, or delete it."""
    queue = view.workspace.queue
    await view.control({"cancel": queue.cancel, "resume": queue.resume, "delete": queue.delete}[verb], run_id)
    return page.redirect("/runs" if verb == "delete" else f"/runs/{run_id}")


@router.get("/runs/{run_id}/curve")
async def curve(view: View, run_id: RunId) -> Response:
    """The steps so far, for the plots, and which metric is drawn."""
    found = await view.control(view.workspace.curve, run_id, most=1000)
    steps = [{key: value for key, value in asdict(each).items() if key in PLOTTED} for each in found]
    values = next((each.metrics for each in reversed(found) if each.metrics), {})
    key = main_metric(values)
    metric = None if key in (None, "loss") else {"key": key, "name": measure_of(key, values).name}
    return JSONResponse({"steps": steps, "of": found[-1].steps if found else None, "metric": metric})


async def _run_values(view: View, run_id: str) -> render.Context:
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
        "more": run["queue"] is not None and run["state"] in OPEN_STATES,
    }


def _is_stalled(run: FullRun) -> bool:
    """Whether the run counts as running but has made no step for a long time."""
    touched = datetime.fromisoformat(run["touched"] or run["created"])
    return run["state"] == "running" and (datetime.now(UTC) - touched).total_seconds() > STALLED_SECONDS


# --- comparisons and sweeps -------------------------------------------------------------------------------------------
# The pages of comparisons and sweeps: start one, watch its cells, and read the reports of all.


Key = Annotated[str, Path(min_length=1, max_length=250)]
StudyId = Annotated[str, Path(min_length=1, max_length=100)]
Verb = Literal["compare", "sweep"]
MOST_STUDIES, MOST_STUDY_LINES = 100, 50  # studies in the list; lines of the log
_BUDGET = Field(
    "budget", "Budget", "Such as 30m or 2h, after which nothing new begins. Empty: until all is done.", kind="time"
)
FIELDS = {
    "compare": (
        Field(
            "methods",
            "Methods",
            "Separated by commas, settings after a colon. Empty: all that suit the task.",
            example="base,full,lora:r=4/16",
        ),
        Field("against", "Baseline", "The method that the others are judged against.", "full"),
        Field("seeds", "Seeds", "Trainings of each method; at least 2 for a verdict.", "5", "number"),
        Field("fractions", "Sizes", "Shares of the training examples, such as `5%, 25%, 100%`.", "100%", "shares"),
        Field("margin", "Margin", "Points that still count as equally good.", "1", "number"),
        _BUDGET,
        Field("texts", "The report shows texts of the data", value="yes", kind="check"),
    ),
    "sweep": (
        Field(
            "settings",
            "Settings",
            "A line each: a range `1e-4..1e-2`, a list `4,8,16`, or one value.",
            "train.lr = 1e-4..1e-2\nmethod.r = 4,8,16\n",
            "settings",
        ),
        Field("trials", "Trials", "Empty: all combinations of lists, or 20 with a range.", kind="number"),
        Field("at_once", "At once", "Trials that wait or run at a time.", "4", "number"),
        _BUDGET,
    ),
}
# A report needs no other file. It runs no script, and only our own pages may show it in a frame.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)


@router.get("/comparisons")
async def list_comparisons(page: Page, view: View) -> Response:
    """All reports in the store, and what workers conduct."""
    found = await view.control(view.workspace.comparisons)
    studies = [
        trainings.study_from_row(each) for each in await view.control(view.workspace.queue.studies, MOST_STUDIES)
    ]
    return page.show("comparisons.html.j2", found=found, studies=studies)


# --- start one --------------------------------------------------------------------------------------------------------


@router.post("/comparisons/start/{verb}")
async def start_study(page: Page, view: View, verb: Verb, form: Sent) -> Response:
    """The options of a comparison or a sweep on a table that was chosen; its plan; and its start."""
    text = await recipe_in(page, form)
    if isinstance(text, Response):
        return text
    do, planned, error = form.text("do"), None, None
    try:
        if do:
            options = _options(verb, form)
            recipe = await view.parsing(Recipe.from_toml, text)
            if do == "start":
                made = await view.control(trainings.submit_study, view, page.owner, recipe, {}, options.order())
                return page.redirect(f"/comparisons/studies/{made.id}")
            planned = await view.preview(trainings.plan_study, view, page.owner, recipe, {}, options.order())
    except TurretError as wrong:
        error = wrong
    values: render.Context = {
        "verb": verb,
        "fields": FIELDS[verb],
        "planned": planned,
        "text": text,
        "source": form.text("source"),
    }
    return page.show("study_start.html.j2", error=error, form=form if do else None, **values)


def _options(verb: Verb, form: Form) -> trainings.CompareOptions | trainings.SweepOptions:
    if verb == "compare":
        return model_in(form, FIELDS[verb], trainings.CompareOptions)
    return model_in(form, FIELDS[verb], trainings.SweepOptions)


# --- one that workers conduct -----------------------------------------------------------------------------------------


@router.get("/comparisons/studies/{study_id}")
async def show_study(page: Page, view: View, study_id: StudyId) -> Response:
    """Its cells, and its report once it has one."""
    return page.show("study.html.j2", **await _study(view, study_id))


@router.get("/comparisons/studies/{study_id}/state")
async def show_study_state(page: Page, view: View, study_id: StudyId) -> Response:
    """The live part of that page."""
    return page.show("study_state.html.j2", **await _study(view, study_id))


@router.get("/comparisons/studies/{study_id}/do/{verb}")
async def ask_about_study(page: Page, view: View, study_id: StudyId, verb: Literal["cancel", "resume"]) -> Response:
    """The dialog that confirms a change."""
    values = await _study(view, study_id)
    return page.show("study_act.html.j2", **values, verb=verb)


@router.post("/comparisons/studies/{study_id}/do/{verb}")
async def act_on_study(page: Page, view: View, study_id: StudyId, verb: Literal["cancel", "resume"]) -> Response:
    """Cancel it with its cells, or put it back into the queue."""
    await _study(view, study_id)  # raises NotFound for the id of a training
    queue = view.workspace.queue
    await view.control(queue.cancel if verb == "cancel" else queue.resume, study_id)
    return page.redirect(f"/comparisons/studies/{study_id}")


async def _study(view: View, study_id: str) -> render.Context:
    row = await view.control(view.workspace.queue.study, study_id)
    log = await view.control(trainings.log, view, row)
    return {"study": trainings.study_from_row(row), "lines": log[: -MOST_STUDY_LINES - 1 : -1]}


# --- reports ----------------------------------------------------------------------------------------------------------


@router.get("/comparisons/{key}")
async def show_comparison(page: Page, view: View, key: Key) -> Response:
    """One report inside a page."""
    found = [each for each in await view.control(view.workspace.comparisons) if each["key"] == key]
    if not found:
        raise NotFound(f"no comparison {ascii(key)[:60]}: `turret compare` makes one")
    return page.show("comparison.html.j2", one=found[0])


@router.get("/comparisons/{key}/report")
async def report(view: View, key: Key) -> Response:
    """The report itself."""
    text = await view.control(view.workspace.report, key)
    return HTMLResponse(text, headers={"content-security-policy": REPORT_POLICY, "x-frame-options": "SAMEORIGIN"})
