"""The pages of experiments with their evidence, and the forms that start one, set gates or make a promise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import Path, Query, Response
from fastapi.responses import JSONResponse

from turret.errors import BadRequest
from turret.experiments.experiment import read_split
from turret.json_types import JsonValue, Plain
from turret.server import moves
from turret.server.console import render
from turret.server.console.render import Field, Form, Page, Sent, model_in, one_of, pages
from turret.server.moves import end_experiment
from turret.server.routes import View
from turret.store import Gate
from turret.store.catalog import PRODUCTION
from turret.store.gates import judge_gate
from turret.workspace.experimenting import STEPS
from turret.workspace.promoting import read_examples

router = pages()
Name = Annotated[str, Path(min_length=1, max_length=200)]
Number = Annotated[int, Path(ge=1, lt=1 << 31)]
Verb = Annotated[str, one_of("ramp", "promote", "rollback", "stop")]


@router.get("/experiments")
async def listing(page: Page, view: View) -> Response:
    """All experiments, the running ones first."""
    exists = await view.control(view.workspace.store.exists)
    found = await view.control(view.workspace.experiments) if exists else []
    return page.show("experiments.html.j2", found=found)


@router.get("/experiments/{name}/{number}")
async def show(page: Page, view: View, name: Name, number: Number) -> Response:
    """One experiment."""
    return page.show("experiment.html.j2", **await _values(view, name, number))


@router.get("/experiments/{name}/{number}/state")
async def show_state(page: Page, view: View, name: Name, number: Number) -> Response:
    """The live part of the page of an experiment."""
    return page.show("experiment_state.html.j2", **await _values(view, name, number))


@router.get("/experiments/{name}/{number}/course")
async def course(view: View, name: Name, number: Number) -> Response:
    """The evidence after each outcome, for the plots."""
    found = await view.control(view.workspace.course, name, number)
    points = [
        {
            "outcomes": each.outcomes,
            "at": each.at,
            "means": each.means,
            "against": {arm: _without_tipping_point(one.as_json()) for arm, one in each.against.items()},
        }
        for each in found.points
    ]
    return JSONResponse({"points": points})


def _without_tipping_point(against: Mapping[str, Plain]) -> Mapping[str, Plain]:
    """Without the tipping point, which a course does not compute."""
    return {key: value for key, value in against.items() if key != "missing"}


@router.get("/experiments/{name}/{number}/do/{verb}")
async def ask(page: Page, view: View, name: Name, number: Number, verb: Verb, arm: str | None = None) -> Response:
    """The dialog that confirms a change."""
    values = await _values(view, name, number)
    return page.show("act.html.j2", **values, verb=verb, arm=arm)


@router.post("/experiments/{name}/{number}/do/{verb}")
async def act(page: Page, view: View, name: Name, number: Number, verb: Verb, form: Sent) -> Response:
    """Ramp, promote, roll back or stop."""
    if verb == "ramp":
        share = read_split(form.text("share")) if form.text("share") else None
        await view.control(view.workspace.experiment(name, number).ramp, share)
    else:
        arm = form.text("arm") if verb == "promote" else None
        await end_experiment(view, name, number, promote=arm, rollback=verb == "rollback")
    await view.control(view.refresh)
    return page.redirect(f"/experiments/{name}/{number}")


async def _values(view: View, name: str, number: int) -> render.Context:
    status = await view.control(view.workspace.experiment(name, number).status)
    from turret.experiments import status_text  # loads numpy, which the rest of the server does not need

    return {"status": status, "experiment": status.experiment, "text": status_text}


# --- what a person decides --------------------------------------------------------------------------------------------
# The forms by which a person decides: start an experiment, set gates, make a promise.
#
# Each is a page with fields. It says first what will happen, then does it by the function that the API calls.


VersionNumber = Annotated[int, Path(ge=1, lt=1 << 53)]
Word = Annotated[str, Query(max_length=200)]
EXPERIMENT = (
    Field("name", "Adapter", "The name whose traffic is split."),
    Field("candidates", "Candidate", "A version such as `news@2`; several with blanks between them.", kind="words"),
    Field("control", "Control", "Empty: the version that the alias names.", example="the alias's version"),
    Field("share", "Share", "Of the traffic, for all candidates together. Empty: the first step.", "5%", "number"),
    Field("steps", "Ramp", "Planned shares, rising; the button Ramp… takes the next.", "5%, 20%, 50%", "shares"),
    Field("metric", "Outcomes", "`binary`, or the bounds of a number such as `1..5`.", "binary"),
    Field("goal", "Better is", value="higher", kind="choice", choices=("higher", "lower")),
    Field("unit", "Counted once", value="user", kind="choice", choices=("user", "session", "request")),
    Field("guards.max_errors", "Most errors", "Roll back above this share, such as `2%`.", kind="number"),
    Field("guards.max_seconds", "Slowest answers", "Seconds; roll back if over 5% take longer.", kind="number"),
    Field("guards.worse_by", "Worse by", "Roll back if outcomes are worse by more.", "0", "number"),
    Field("guards.promote", "A better candidate takes the alias automatically", kind="check"),
    Field("alias", "Alias", value=PRODUCTION),
    Field("shadows", "Shadows", "Versions that run in the background and never answer.", kind="words"),
    Field("alpha", "False winners", "At most this share of experiments.", "5%", "number"),
    Field("outcome_ttl", "Outcome within", "After the first answer to a unit.", "7d", "time"),
    Field("missing_bound", "Missing because bad", "A verdict holds even so.", "5%", "number"),
)
GATES = (
    Field("alias", "Alias", "Whose next promote is checked.", PRODUCTION),
    Field("add", "Gate", "A metric, a sign and a number, such as `accuracy>=0.9`.", kind="gates"),
    Field(
        "golden",
        "Golden examples",
        "CSV: the names `text` and `label`, `equals` or `contains`, then rows.",
        kind="table",
    ),
    Field("share", "Of them must pass", "Empty: all.", kind="number"),
)
PROMISE = (
    Field("error", "Wrong at most", "The share of the decided answers.", "2%", "number"),
    Field("confidence", "Confidence", "The chance that the promise holds.", "95%", "number"),
    Field("metric", "Measured by", "`error`, `misses:LABEL` or `precision:LABEL`.", "error"),
    Field("source", "Labelled examples", "The id of a table that you sent. Empty: those that the training held out."),
    Field("when_broken", "When broken", value="alarm", kind="choice", choices=("alarm", "stricter", "rollback")),
    Field("outcome_ttl", "Outcome within", "After the answer.", "7d", "time"),
    Field("missing_bound", "Missing outcomes", "A verdict must hold if this share is missing.", "5%", "number"),
)


@router.get("/experiments/start")
async def show_experiment(page: Page, name: Word = "", candidate: Word = "") -> Response:
    """The form that starts an experiment."""
    return _page(page, "experiment", EXPERIMENT, form=Form({"name": name, "candidates": candidate}))


@router.post("/experiments/start")
async def start_experiment(page: Page, view: View, form: Sent) -> Response:
    """What the experiment will do, or its start."""
    fields, name = EXPERIMENT[1:], form.text("name")
    asked = model_in(form, fields, moves.StartRequest)
    if form.text("do") == "start":
        started = (await moves.start_experiment(view, name, asked)).experiment
        await view.control(view.refresh)
        return page.redirect(f"/experiments/{started.adapter}/{started.number}")
    said = await view.control(_experiment_said, view, name, asked)
    return _page(page, "experiment", EXPERIMENT, said, form)


@router.get("/adapters/{name}/gates")
async def show_gates(page: Page, name: Name, alias: Word = PRODUCTION) -> Response:
    """The gates of a name, with a form for another."""
    return await _gates(page, name, form=Form({"alias": alias}))


@router.post("/adapters/{name}/gates")
async def change_gates(page: Page, view: View, name: Name, form: Sent) -> Response:
    """What a gate would do, or set it, or remove one."""
    if remove := form.text("remove"):
        asked = moves.GateRequest.model_validate({"alias": form.text("alias"), "remove": [remove]})
    else:
        asked = model_in(form, GATES, moves.GateRequest)
    if remove or form.text("do") == "start":
        await view.control(moves.change_gates, view, name, asked)
        return page.redirect(f"/adapters/{name}/gates?alias={asked.alias}")
    return await _gates(page, name, await view.control(_gates_said, view, name, asked), form)


async def _gates(page: Page, name: str, said: list[str] | None = None, form: Form | None = None) -> Response:
    found = await page.view.control(page.view.workspace.gate_status, name)
    return _page(page, "gates", GATES, said, form, name=name, gates=found)


@router.get("/adapters/{name}/{number}/promise")
async def show_promise(page: Page, view: View, name: Name, number: VersionNumber) -> Response:
    """The form that makes a promise of a version."""
    version = await view.control(view.workspace.resolve, f"{name}@{number}")
    return _page(page, "promise", PROMISE, version=version)


@router.post("/adapters/{name}/{number}/promise")
async def make_promise(page: Page, view: View, name: Name, number: VersionNumber, form: Sent) -> Response:
    """What the promise will do, or make it."""
    version = await view.control(view.workspace.resolve, f"{name}@{number}")
    asked = model_in(form, PROMISE, moves.PromiseAsked)
    if form.text("do") == "start":
        await view.preview(moves.make_promise, view, page.owner, str(version), asked)
        return page.redirect(f"/adapters/{name}/{number}#promise")
    return _page(page, "promise", PROMISE, _promise_said(str(version), asked), form, version=version)


# --- what will happen -------------------------------------------------------------------------------------------------


def _experiment_said(view: View, name: str, asked: moves.StartRequest) -> list[str]:
    store = view.workspace
    control = str(store.resolve(f"{name}@{asked.alias}" if asked.control is None else asked.control))
    candidates, shadows = ([str(store.resolve(each)) for each in some] for some in (asked.candidates, asked.shadows))
    if not candidates and not shadows:
        raise BadRequest("an experiment needs two versions: give at least one candidate or shadow")
    share = asked.share if isinstance(asked.share, float) else asked.steps[0] if asked.steps else STEPS[0]
    found = [f"{control} is the control of {name}@{asked.alias}: it keeps the rest of the traffic"]
    if candidates:
        found.append(f"{' and '.join(candidates)} answers {render.share(share)} of the {asked.unit}s")
    if shadows:
        found.append(f"{' and '.join(shadows)} runs in the background, and no client sees its answers")
    guards = asked.guards
    if guards.worse_by is not None:
        found.append("a candidate with worse outcomes is rolled back automatically, beyond chance")
    if guards.max_errors is not None:
        found.append(f"so is one with more errors than {render.share(guards.max_errors)}")
    if guards.max_seconds is not None:
        found.append(f"so is one of whose answers over 5% take longer than {guards.max_seconds:g} seconds")
    how = "automatically, if its gates pass" if guards.promote else "by the button Promote… alone"
    found.append(f"a better candidate takes the alias {how}")
    return [*found, "Roll back… or Stop… on its page ends it: then the control answers all"]


def _gates_said(view: View, name: str, asked: moves.GateRequest) -> list[str]:
    held = {alias: each for each in view.workspace.list(name) for alias in each.aliases}.get(asked.alias)
    found = []
    for text in asked.add:
        now = "no version has that alias now"
        if held is not None:
            passes, value = judge_gate(held, Gate.parse(text))
            now = f"{held} {'passes' if passes else 'does not pass'}: {value}"
        found.append(f"a version without {text} cannot take {asked.alias}; {now}")
    with moves.golden_file(asked.golden) as path:
        if path is not None:
            count = len(read_examples(path).examples)
            least = "all" if asked.share is None else render.share(asked.share)
            found.append(f"{count} golden examples are asked at each promote to {asked.alias}: {least} must be right")
    if not found:
        raise BadRequest("nothing to set: give a gate or golden examples")
    return [*found, "no alias moves now; the button Remove takes a gate back"]


def _promise_said(version: str, asked: moves.PromiseAsked) -> list[str]:
    of = "the table" if asked.source else "what its training held out"
    broken = {"alarm": "an alarm", "stricter": "a stricter threshold", "rollback": "a rollback of its alias"}
    return [
        f"another process loads the base, and {version} answers {of}; nothing else changes meanwhile",
        f"the lowest threshold is chosen with which, at {render.share(asked.confidence)} confidence, at most "
        f"{render.share(asked.error)} is wrong ({asked.metric})",
        "answers below it abstain from then on, wherever the version answers: they go to a person",
        f"outcomes that break it lead to {broken[asked.when_broken]}",
        "a promise cannot be taken back; a new one replaces it",
    ]


def _page(
    page: Page,
    what: str,
    fields: tuple[Field, ...],
    said: list[str] | None = None,
    form: Form | None = None,
    **values: JsonValue,
) -> Response:
    common: render.Context = {"name": "", "version": "", "gates": (), **values}
    return page.show("decide.html.j2", form=form, **common, fields=fields, said=said, what=what)
