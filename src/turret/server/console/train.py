"""The pages from a table to a training: choose it, correct what it shows, read the plan, start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import Query, Request, Response

from turret.data import source as tables
from turret.errors import BadRequest, TurretError
from turret.methods import METHODS
from turret.methods import SHOWN as METHODS_SHOWN
from turret.recipe import Recipe, toml
from turret.recipe.default_base import AUTO
from turret.server import trainings
from turret.server.console import render
from turret.server.console.forms import Form, Sent, pages
from turret.server.routes import FileId, View, keep, owner_of
from turret.server.trainings import SentPlan
from turret.store.client_files import TABLE
from turret.tasks import TASKS, Task

router = pages()
USUAL = next(iter(METHODS_SHOWN))  # method
MOST = 50  # tables in the list
LEVELS = ("refuse", "warn", "ok")  # of checks, in the order of the page
SECTIONS = ("data", "task", "train")  # of a recipe, whose keys a form may set
STEPS = {  # what a table is for -> the path of the next step, and the words of its button
    "plan": ("/train/plan", "Check the plan"),
    "compare": ("/comparisons/start/compare", "Compare methods"),
    "sweep": ("/comparisons/start/sweep", "Search settings"),
}
Source = Annotated[str, Query(min_length=1, max_length=500)]
Then = Literal["plan", "compare", "sweep"]


@router.get("/train")
async def show(request: Request, view: View, then: Then = "plan") -> Response:
    """The form for a table, and the tables that were sent before."""
    return await _start(request, view, then=then)


@router.post("/train")
async def upload(request: Request, view: View, form: Sent) -> Response:
    """Store a table, and go on to what it shows."""
    try:
        if form.file is None:
            raise BadRequest("no file is chosen: choose a table")
        kept = await keep(view, owner_of(request.state.caller), form.file, TABLE)
    except TurretError as error:
        return await _start(request, view, error, _then(form))
    then = _then(form)
    return render.redirect(request, f"/train/recipe?source={kept.id}" + ("" if then == "plan" else f"&then={then}"))


@router.get("/train/tables/{file_id}/delete")
async def ask(request: Request, view: View, file_id: FileId, then: Then = "plan") -> Response:
    """The dialog that confirms the end of a table."""
    found = await view.control(view.services.files.find, owner_of(request.state.caller), file_id)
    return render.page(request, view, "train_table_act.html.j2", file=found, then=then)


@router.post("/train/tables/{file_id}/delete")
async def delete_table(request: Request, view: View, file_id: FileId, form: Sent) -> Response:
    """Delete a table that was sent."""
    await view.control(view.services.files.delete, owner_of(request.state.caller), file_id)
    then = _then(form)
    return render.redirect(request, "/train" if then == "plan" else f"/train?then={then}")


def _then(form: Form) -> str:
    """The step after the table: a key of STEPS."""
    return form.text("then") if form.text("then") in STEPS else "plan"


async def _start(request: Request, view: View, error: TurretError | None = None, then: str = "plan") -> Response:
    owner = owner_of(request.state.caller)
    found = await view.control(view.services.files.listed, owner, purpose=TABLE, limit=MOST)
    problem, status = render.told(error)
    values = {"found": found, "formats": tables.SUFFIXES, "most": view.services.limits.file_bytes}
    values |= {"problem": problem, "then": then, "here": "train" if then == "plan" else "comparisons"}
    return render.page(request, view, "train.html.j2", status, **values)


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
        for key in form.names:
            section, _, rest = key.partition(".")
            values = [each for each in map(str.strip, form.all(key)) if each]
            column = section == "data" and rest in _roles()
            if values and (section in SECTIONS or key in ("name", "base")) and not (column and other):
                found[key] = values[0] if len(values) == 1 else values
        return cls(form.text("source"), found, form.text("method") or USUAL, _then(form))

    def as_settings(self) -> dict[str, str]:
        """For `turret.workspace.drafting`."""
        kind, _, name = self.method.partition(":")
        found = {key: each if isinstance(each, str) else toml.written(each) for key, each in self.settings.items()}
        named_by = METHODS[kind].named_by if kind in METHODS else None
        return found | {"method.kind": kind} | ({f"method.{named_by}": name} if name and named_by else {})


def _roles() -> frozenset[str]:
    return frozenset(role for task in TASKS.values() for role in task.schema().roles)


@router.get("/train/recipe")
async def look(request: Request, view: View, source: Source, then: Then = "plan") -> Response:
    """What a table shows, with a form to correct it."""
    return await _look(request, view, Chosen(source, then=then))


@router.post("/train/recipe")
async def look_again(request: Request, view: View, form: Sent) -> Response:
    """The same, with what was corrected."""
    return await _look(request, view, Chosen.of(form))


async def _look(request: Request, view: View, chosen: Chosen, error: TurretError | None = None) -> Response:
    problem, status = render.told(error)
    try:
        made = await _drafted(request, view, chosen)
    except TurretError as wrong:
        if chosen.settings:  # one of them does not fit
            return await _look(request, view, Chosen(chosen.source, then=chosen.then), wrong)
        return await _start(request, view, wrong, chosen.then)
    problem = problem or made.problem
    kind = str(chosen.settings.get("task.kind") or (made.guess.kind if made.guess else ""))
    task = TASKS.get(kind)
    values = {
        "chosen": chosen,
        "made": made,
        "problem": problem,
        "kind": kind,
        "kinds": list(TASKS),
        "roles": [] if task is None else _columns(task, chosen, made),
        "used": {} if made.guess is None else _used(made.guess.columns),
        "base": chosen.settings.get("base") or _base_for(view, task),
        "suggested": [AUTO, *(each.name for each in view.engines.bases)],
        "methods": METHODS_SHOWN,
        "steps": {chosen.then: STEPS[chosen.then]} | STEPS,
    }
    return render.page(request, view, "train_recipe.html.j2", status, **values)


async def _drafted(request: Request, view: View, chosen: Chosen) -> trainings.Drafted:
    owner = owner_of(request.state.caller)
    return await view.preview(trainings.draft, view, owner, chosen.source, {}, chosen.as_settings())


@dataclass(frozen=True)
class Choice:
    """A role of the task, with the column that has it. several: it may be several columns."""

    role: str
    columns: list[str]
    several: bool


def _columns(task: type[Task], chosen: Chosen, made: trainings.Drafted) -> list[Choice]:
    schema, guessed = task.schema(), {} if made.guess is None else made.guess.columns
    found = []
    for role in schema.roles:
        named = chosen.settings.get(f"data.{role}") or guessed.get(role) or []
        several = schema.several and role == schema.usual[-1]
        found.append(Choice(role, [named] if isinstance(named, str) else list(named), several))
    return found


def _used(columns: Mapping[str, str | list[str]]) -> dict[str, str]:
    """Column -> role."""
    every = ((role, [named] if isinstance(named, str) else named) for role, named in columns.items())
    return {column: role for role, named in every for column in named}


def _base_for(view: View, task: type[Task] | None) -> str:
    """A base of this server that can learn the task, so that this server answers with what is trained."""
    able = (each.name for each in view.engines.bases if task and task.head in each.engine.base.family.head_kinds)
    return next(able, AUTO)


# --- the plan, and the start ------------------------------------------------------------------------------------------


@router.post("/train/plan")
async def plan(request: Request, view: View, form: Sent) -> Response:
    """Plan the recipe in the form. Without one, a recipe is drafted from what is chosen for a table."""
    text, source = await recipe_in(request, view, form), form.text("source")
    if isinstance(text, Response):
        return text
    try:
        recipe = await view.parsing(Recipe.from_toml, text)
        planned = await view.preview(trainings.plan, view, owner_of(request.state.caller), recipe, {})
    except TurretError as error:
        return _planned(request, view, text, source, None, error)
    return _planned(request, view, text, source, planned)


async def recipe_in(request: Request, view: View, form: Form) -> str | Response:
    """The recipe in a form. Without one, a draft for the chosen table; if no draft can be made, the table's page."""
    if text := form.raw("recipe"):
        return text
    chosen = Chosen.of(form)
    try:
        made = await _drafted(request, view, chosen)
    except TurretError as error:
        return await _look(request, view, Chosen(chosen.source, then=chosen.then), error)
    return made.recipe or await _look(request, view, chosen)


@router.post("/train/start")
async def start(request: Request, view: View, form: Sent) -> Response:
    """Put the training into the queue, and go to its page."""
    text = form.raw("recipe")
    try:
        recipe = await view.parsing(Recipe.from_toml, text)
        run = await view.control(trainings.submit, view, owner_of(request.state.caller), recipe, {})
    except TurretError as error:
        return _planned(request, view, text, form.text("source"), None, error)
    return render.redirect(request, f"/runs/{run['id']}")


def _planned(
    request: Request,
    view: View,
    text: str,
    source: str,
    planned: SentPlan | None,
    error: TurretError | None = None,
) -> Response:
    problem, status = render.told(error)
    checks = sorted(planned["plan"]["checks"] if planned else [], key=lambda each: LEVELS.index(each["level"]))
    values = {
        "text": text,
        "source": source,
        "planned": planned,
        "checks": checks,
        "refused": any(each["level"] == "refuse" for each in checks),
        "problem": problem,
    }
    return render.page(request, view, "train_plan.html.j2", status, **values)
