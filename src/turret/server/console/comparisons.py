"""The pages of comparisons and sweeps: start one, watch its cells, and read the reports of all."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path, Request, Response
from fastapi.responses import HTMLResponse

from turret.errors import NotFound, TurretError
from turret.recipe import Recipe
from turret.server import trainings
from turret.server.console import render
from turret.server.console.forms import Field, Form, Sent, model_in, pages, texts_in
from turret.server.console.train import recipe_in
from turret.server.routes import View, owner_of

router = pages()
Key = Annotated[str, Path(min_length=1, max_length=250)]
StudyId = Annotated[str, Path(min_length=1, max_length=100)]
Verb = Literal["compare", "sweep"]
MOST, MOST_LINES = 100, 50  # studies in the list; lines of the log
_BUDGET = Field(
    "budget", "Budget", "Such as 30m or 2h, after which nothing new begins. Empty: until all is done.", kind="time"
)
FIELDS = {
    "compare": (
        Field(
            "methods",
            "Methods",
            "Separated by commas, settings after a colon. Empty: all that suit the task.",
            example="base,linear,full,lora:r=4/16,prefix",
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
async def listing(request: Request, view: View) -> Response:
    """All reports in the store, and what workers conduct."""
    found = await view.control(view.workspace.comparisons)
    studies = [trainings.shown(each) for each in await view.control(view.workspace.queue.studies, MOST)]
    return render.page(request, view, "comparisons.html.j2", found=found, studies=studies)


# --- start one --------------------------------------------------------------------------------------------------------


@router.post("/comparisons/start/{verb}")
async def start(request: Request, view: View, verb: Verb, form: Sent) -> Response:
    """The options of a comparison or a sweep on a table that was chosen; its plan; and its start."""
    text = await recipe_in(request, view, form)
    if isinstance(text, Response):
        return text
    do, owner, planned, error = form.text("do"), owner_of(request.state.caller), None, None
    try:
        if do:
            options = _options(verb, form)
            recipe = await view.parsing(Recipe.from_toml, text)
            if do == "start":
                made = await view.control(trainings.submit_study, view, owner, recipe, {}, options.order())
                return render.redirect(request, f"/comparisons/studies/{made.id}")
            planned = await view.preview(trainings.plan_study, view, owner, recipe, {}, options.order())
    except TurretError as wrong:
        error = wrong
    problem, status = render.told(error)
    values: render.Context = {
        "verb": verb,
        "fields": FIELDS[verb],
        "texts": texts_in(form, FIELDS[verb]),
        "planned": planned,
        "text": text,
        "source": form.text("source"),
        "problem": problem,
    }
    return render.page(request, view, "study_start.html.j2", status, **values)


def _options(verb: Verb, form: Form) -> trainings.CompareOptions | trainings.SweepOptions:
    if verb == "compare":
        return model_in(form, FIELDS[verb], trainings.CompareOptions)
    return model_in(form, FIELDS[verb], trainings.SweepOptions)


# --- one that workers conduct -----------------------------------------------------------------------------------------


@router.get("/comparisons/studies/{study_id}")
async def show_study(request: Request, view: View, study_id: StudyId) -> Response:
    """Its cells, and its report once it has one."""
    return render.page(request, view, "study.html.j2", **await _study(view, study_id))


@router.get("/comparisons/studies/{study_id}/state")
async def show_study_state(request: Request, view: View, study_id: StudyId) -> Response:
    """The live part of that page."""
    return render.page(request, view, "study_state.html.j2", **await _study(view, study_id))


@router.get("/comparisons/studies/{study_id}/do/{verb}")
async def ask(request: Request, view: View, study_id: StudyId, verb: Literal["cancel", "resume"]) -> Response:
    """The dialog that confirms a change."""
    values = await _study(view, study_id)
    return render.page(request, view, "study_act.html.j2", **values, verb=verb)


@router.post("/comparisons/studies/{study_id}/do/{verb}")
async def act(request: Request, view: View, study_id: StudyId, verb: Literal["cancel", "resume"]) -> Response:
    """Cancel it with its cells, or put it back into the queue."""
    await _study(view, study_id)  # raises NotFound for the id of a training
    queue = view.workspace.queue
    await view.control(queue.cancel if verb == "cancel" else queue.resume, study_id)
    return render.redirect(request, f"/comparisons/studies/{study_id}")


async def _study(view: View, study_id: str) -> render.Context:
    row = await view.control(view.workspace.queue.study, study_id)
    log = await view.control(trainings.log, view, row)
    return {"study": trainings.shown(row), "lines": log[: -MOST_LINES - 1 : -1]}


# --- reports ----------------------------------------------------------------------------------------------------------


@router.get("/comparisons/{key}")
async def show(request: Request, view: View, key: Key) -> Response:
    """One report inside a page."""
    found = [each for each in await view.control(view.workspace.comparisons) if each["key"] == key]
    if not found:
        raise NotFound(f"no comparison {ascii(key)[:60]}: `turret compare` makes one")
    return render.page(request, view, "comparison.html.j2", one=found[0])


@router.get("/comparisons/{key}/report")
async def report(view: View, key: Key) -> Response:
    """The report itself."""
    text = await view.control(view.workspace.report, key)
    return HTMLResponse(text, headers={"content-security-policy": REPORT_POLICY, "x-frame-options": "SAMEORIGIN"})
