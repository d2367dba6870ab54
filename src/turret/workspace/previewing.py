"""What a client of a server sees of a table: its rows, the draft of a recipe for it, and the plan of a recipe.

All are made in helper processes, because they read files of tenants and load bases. Loads no torch itself.

The process that plans loads the base of a recipe as `turret plan` does. `DataReaders` has read the data of a plan; only
the examples of a promise are read here. It downloads nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict, final

from turret.access import Access, acting
from turret.data import Dataset
from turret.data.examples import load_dataset
from turret.errors import DataError, EngineError, RecipeError, StoreError, TurretError
from turret.json_types import JsonObject, Plain
from turret.process import Died, HelperProcess
from turret.recipe import Recipe
from turret.store import Store
from turret.store.catalog import who
from turret.store.jobs import StudySpec
from turret.workspace import promising
from turret.workspace.child_process import OUTAGE, parents_store, status_of
from turret.workspace.data_readers import OFFLINE, AboutReader, DataReaders, HelperReply
from turret.workspace.progress import silent
from turret.workspace.queueing import (
    ComparisonRequest,
    Queue,
    SentFiles,
    bring_data,
    is_sent_source,
    order_of,
    require_sent_source,
    sent_file,
)

READ_SECONDS = 60.0  # that reading a table may take
PLAN_SECONDS = 180.0  # that a plan may take, with the load of its base
IDLE_SECONDS = 60.0  # after which a helper process ends


@final
class PlanQuestion(TypedDict):
    """A plan to make. data: the file of the data set."""

    tenant: str
    recipe: str
    data: str
    study: StudySpec | None


@final
class PromiseQuestion(TypedDict):
    """A promise to make. table: the name of a table in the folder; empty: what the training held out."""

    tenant: str
    promise: JsonObject
    version: str
    who: str | None
    folder: str
    table: str


class Previews:
    """Drafts and plans for the clients of a server, of all tenants. Any thread may call its methods.

    Args:
        store: as the server opened it.
    """

    def __init__(self, store: Store) -> None:
        self._readers = DataReaders(store, READ_SECONDS, idle=IDLE_SECONDS, offline=True)
        self._planner = HelperProcess[PlanQuestion | PromiseQuestion, HelperReply](
            __name__,
            {"local": str(store.root.absolute()), "offline": True},
            PLAN_SECONDS,
            None,  # a GPU's driver reserves more addresses than any machine has memory
            "the recipe cannot be planned",
            store=store.location.given,
            idle=IDLE_SECONDS,
        )

    def draft(self, source: str, files: SentFiles, settings: Mapping[str, str]) -> JsonObject:
        """As `turret.workspace.drafting.inspect`, as JSON.

        Args:
            files: tables by name, one of which `source` may name.
            settings: `key=value` settings of the recipe that are known.

        Raises:
            DataError: the data cannot be read, or a setting is unknown or does not fit.
        """
        require_sent_source(source, files)
        if named := settings.keys() & {"data", "data.source"}:  # it could name a file of this machine
            raise DataError(f"settings: {min(named)} is not a setting of a draft: name the data in source")
        with tempfile.TemporaryDirectory(prefix="turret-draft-") as folder:
            _bring(files, source, Path(folder))
            return self._readers.inspect(source, Path(folder), settings)

    def sample(self, name: str, content: bytes, most: int) -> JsonObject:
        """As `turret.workspace.drafting.sample`, as JSON, for a table that a client sends. Raises DataError."""
        require_sent_source(name, {name: content})
        with tempfile.TemporaryDirectory(prefix="turret-table-") as folder:
            _bring({name: content}, name, Path(folder))
            return self._readers.sample(name, Path(folder), most)

    def plan(
        self,
        store: Store,
        recipe: Recipe,
        files: SentFiles,
        own_base: str | None = None,
        study: StudySpec | None = None,
    ) -> JsonObject:
        """As `Workspace.plan`, as JSON, with the filled recipe as `toml`.

        Args:
            store: as the caller sees it.
            files: tables by name; `data.source` may name one.
            own_base: the base of the server, which may be a folder.
            study: a comparison or a sweep, whose plan it is, as `turret.workspace.queueing.as_spec` writes it.

        Raises:
            NotFound: the caller does not see the adapter, the base or a version that the recipe names.
            DataError: the data cannot be read.
            RecipeError: the recipe cannot be planned here.
        """
        Queue(store).require_sent(recipe, files, own_base)
        with tempfile.TemporaryDirectory(prefix="turret-plan-") as folder:
            _bring(files, recipe.data.source, Path(folder))
            tenant = store.access.tenant
            data = self._readers.read_sent(tenant, recipe, Path(folder))
            asked: PlanQuestion = {"tenant": tenant, "recipe": recipe.to_toml(), "data": str(data), "study": study}
            return self._ask_planner(asked, "plan")["found"]

    def promise(
        self, store: Store, version: str, request: Mapping[str, Plain], table: Path | None = None, name: str = ""
    ) -> None:
        """As `Workspace.promise`, in a process that loads the base of the version.

        Args:
            store: as the caller sees it.
            request: keys of `turret.workspace.promising.PromiseRequest`.
            table: labelled examples; None: those that the training held out.
            name: of the table.

        Raises:
            RecipeError: the examples cannot carry the bound, or cannot be read.
        """
        tenant, files = store.access.tenant, {} if table is None else {name: table}
        if files:
            require_sent_source(name, files)
        with tempfile.TemporaryDirectory(prefix="turret-promise-") as folder:
            _bring(files, name, Path(folder))
            asked: PromiseQuestion = {
                "tenant": tenant,
                "promise": dict(request),
                "version": version,
                "who": who(),
                "folder": folder,
                "table": name,
            }
            self._ask_planner(asked, "promise")

    def _ask_planner(self, asked: PlanQuestion | PromiseQuestion, what: str) -> HelperReply:
        try:
            found = self._planner.ask(asked)
        except EngineError as error:
            raise StoreError(str(error)) from None
        if isinstance(found, Died):
            why = f"took longer than {PLAN_SECONDS:g} seconds" if found.late else "ended its process"
            raise RecipeError(f"the {what} was not made, because it {why}: choose a smaller base, or make it elsewhere")
        if found["status"]:
            kind = StoreError if found["status"] == OUTAGE else RecipeError
            raise kind(str(found["text"]))
        return found

    def close(self) -> None:
        """End the helper processes."""
        self._readers.close()
        self._planner.close()


def _bring(files: SentFiles, source: str, folder: Path) -> None:
    """Show a file under its name in a folder, where a helper reads it."""
    if source in files:
        file = sent_file(files, source, folder)
        if file != folder / source:
            (folder / source).parent.mkdir(exist_ok=True)
            try:
                (folder / source).symlink_to(file.absolute())
            except OSError:  # Windows
                shutil.copyfile(file, folder / source)


# --- the process ------------------------------------------------------------------------------------------------------


MOST_MEASURED = 6  # rows of a comparison


def helper(about: AboutReader) -> Callable[[PlanQuestion | PromiseQuestion], HelperReply]:
    """What plans recipes and studies and makes promises, in a process of its own."""
    os.environ[OFFLINE] = "1"  # before the libraries of the Hub are loaded
    from turret.workspace import training

    store = parents_store(about["local"])

    def find(asked: PlanQuestion | PromiseQuestion) -> JsonObject:
        own = store.with_access(Access(asked["tenant"]))
        if "promise" in asked:
            _promise(own, asked)
            return {}
        recipe, data = Recipe.from_toml(asked["recipe"]), load_dataset(Path(asked["data"]))
        if asked["study"] is not None:
            return _planned_study(own, recipe, asked["study"], data)
        planned = training.plan(own, recipe, training.Callbacks(), data)
        return {**planned.as_json(), "toml": planned.recipe.to_toml()}

    def answer(asked: PlanQuestion | PromiseQuestion) -> HelperReply:
        try:
            return {"status": 0, "found": find(asked)}
        except TurretError as error:
            return {"status": status_of(error), "text": str(error)}
        except MemoryError:
            return {"status": 1, "text": "the plan takes too much memory: choose a smaller base, or train elsewhere"}

    return answer


def _promise(store: Store, asked: PromiseQuestion) -> None:
    """Make a promise, on a table in a folder or on what the training held out."""
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
    from turret.workspace import comparing, sweeping

    order = order_of(spec)
    if isinstance(order, ComparisonRequest):
        ready = comparing.prepare(store, recipe, order, silent, data)
        comparing.require_few(ready.planned)
        design, recipe = ready.design, ready.design.recipe
        rows = [(each.label, each.recipe if each.trains else None) for each in design.candidates]
        times = len(design.seeds) * sum(design.fractions)
        found: JsonObject = {"cells": ready.planned.trainings, "missing": ready.planned.missing}
        found["said"] = [f"judged against {design.against}", *ready.planned.power.sentences()]
    else:
        recipe, request = sweeping.split(order, recipe)
        search = sweeping.prepare(store, recipe, request, silent, data)
        rows, times = [("one trial", search.recipe)], request.count
        how = "all combinations" if request.count == request.combinations else "Optuna proposes the settings"
        judged = f"judged by {search.metric} on {len(data.validation)} validation examples; the test split is not used"
        found = {"cells": request.count, "missing": request.count, "said": [how, judged]}
    measured = [_estimate_row(store, title, trained, data) for title, trained in rows[:MOST_MEASURED]]
    seconds = [each["seconds"] for each, (_, trained) in zip(measured, rows, strict=False) if trained is not None]
    whole = len(rows) <= MOST_MEASURED and None not in seconds
    return {**found, "name": recipe.name, "rows": measured, "seconds": sum(seconds) * times if whole else None}


def _estimate_row(store: Store, title: str, trained: Recipe | None, data: Dataset) -> JsonObject:
    """How long a training of a row takes, and why it is refused, if it is. trained: None if it trains nothing."""
    from turret.workspace import training

    if trained is None:
        return {"title": title, "seconds": None, "refused": None}
    try:
        plan = training.plan(store, trained, training.Callbacks(), data).plan
    except TurretError as error:
        return {"title": title, "seconds": None, "refused": str(error)}
    return {"title": title, "seconds": plan.seconds, "refused": plan.refusal() or None}
