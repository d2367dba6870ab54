"""The helper process that plans recipes and studies, and makes promises, of a server's clients.

It loads the base of a recipe as `turret plan` does. `turret.workspace.data_reader` has read the data of a plan; only
the examples of a promise are read here. It downloads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from turret.access import Access, acting
from turret.data import Dataset
from turret.data.examples import load_dataset
from turret.errors import DataError, TurretError
from turret.json_types import JsonObject
from turret.recipe import Recipe
from turret.store import Store
from turret.store.jobs import StudySpec
from turret.workspace import comparing, sweeping
from turret.workspace.child_process import parents_store, status_of
from turret.workspace.data_readers import OFFLINE
from turret.workspace.orders import ComparisonRequest, order_of, require_few
from turret.workspace.previewing import AboutPlanner, PlannerReply, PlanQuestion, PromiseQuestion
from turret.workspace.progress import silent
from turret.workspace.queueing import bring_data, is_sent_source

MOST_MEASURED = 6  # rows of a comparison


def helper(about: AboutPlanner) -> Callable[[PlanQuestion | PromiseQuestion], PlannerReply]:
    """What plans a recipe."""
    os.environ[OFFLINE] = "1"  # before the libraries of the Hub are loaded
    from turret.workspace import training

    store = parents_store(about["local"])

    def answer(asked: PlanQuestion | PromiseQuestion) -> PlannerReply:
        try:
            own = store.with_access(Access(asked["tenant"]))
            if "promise" in asked:
                _promise(own, asked)
                return {"status": 0}
            recipe = Recipe.from_toml(asked["recipe"])
            data = load_dataset(Path(asked["data"]))
            if asked["study"] is not None:
                return {"status": 0, "planned": _planned_study(own, recipe, asked["study"], data)}
            planned = training.plan(own, recipe, training.Callbacks(), data)
        except TurretError as error:
            return {"status": status_of(error), "text": str(error)}
        except MemoryError:
            return {"status": 1, "text": "the plan takes too much memory: choose a smaller base, or train elsewhere"}
        return {"status": 0, "planned": planned.as_json(), "toml": planned.recipe.to_toml()}

    return answer


def _promise(store: Store, asked: PromiseQuestion) -> None:
    """Make a promise, on a table in a folder or on what the training held out."""
    from turret.workspace import promising

    version, folder = store.resolve(asked["version"]), Path(asked["folder"])
    text = str(version.lineage.get("recipe") or "")
    recipe = Recipe.from_toml(text) if text else None
    sent = recipe is not None and is_sent_source(recipe.data.source)  # else a recipe could name a file of this machine
    if not asked["table"] and not sent:
        raise DataError(f"what the training of {version} held out is not in the store: send labelled examples")
    os.chdir(bring_data(store, recipe, folder) if recipe is not None and sent else folder)
    settings: JsonObject = asked["promise"]
    request = promising.PromiseRequest(**settings, data=asked["table"] or None, trained=sent)
    try:
        with acting(asked["who"]):
            promising.make(store, str(version), request, silent)
    finally:
        os.chdir("/")


def _planned_study(store: Store, recipe: Recipe, spec: StudySpec, data: Dataset) -> JsonObject:
    """What a comparison or a sweep trains, what it can decide, and how long its trainings take one after another."""
    order = order_of(spec)
    if isinstance(order, ComparisonRequest):
        ready = comparing.prepare(store, recipe, order, silent, data)
        require_few(ready.planned)
        design, recipe = ready.design, ready.design.recipe
        rows = [_Row(each.label, each.recipe, each.trains) for each in design.candidates]
        times = len(design.seeds) * sum(design.fractions)
        found: JsonObject = {"cells": ready.planned.trainings, "missing": ready.planned.missing}
        found["said"] = [f"judged against {design.against}", *ready.planned.power.sentences()]
    else:
        recipe, request = order.split(recipe)
        search = sweeping.prepare(store, recipe, request, silent, data)
        rows, times = [_Row("one trial", search.recipe, True)], request.count
        how = "all combinations" if request.count == request.combinations else "Optuna proposes the settings"
        judged = f"judged by {search.metric} on {len(data.validation)} validation examples; the test split is not used"
        found = {"cells": request.count, "missing": request.count, "said": [how, judged]}
    measured = [_measured(store, row, data) for row in rows[:MOST_MEASURED]]
    seconds = [each["seconds"] for each, row in zip(measured, rows, strict=False) if row.trains]
    whole = len(rows) <= MOST_MEASURED and None not in seconds
    return {**found, "name": recipe.name, "rows": measured, "seconds": sum(seconds) * times if whole else None}


@dataclass(frozen=True)
class _Row:
    title: str
    recipe: Recipe
    trains: bool


def _measured(store: Store, row: _Row, data: Dataset) -> JsonObject:
    """How long a training of a row takes, and why it is refused, if it is."""
    from turret.workspace import training

    if not row.trains:
        return {"title": row.title, "seconds": None, "refused": None}
    try:
        plan = training.plan(store, row.recipe, training.Callbacks(), data).plan
    except TurretError as error:
        return {"title": row.title, "seconds": None, "refused": str(error)}
    return {"title": row.title, "seconds": plan.seconds, "refused": plan.refusal() or None}
