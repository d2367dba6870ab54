"""Drafts, plans and trainings of tables that clients send, as the control plane and the console make them.

All functions wait for the store or for another process: call them on a thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from pydantic import BaseModel, Field

from turret.errors import BadRequest
from turret.json_types import JsonMapping, JsonObject
from turret.recipe import Recipe
from turret.server.error_responses import without_paths
from turret.server.services import View
from turret.server.uploads import TABLE
from turret.store import client_files
from turret.workspace.queueing import SentFiles

SENT = re.compile(f"({client_files.ID})(/.*)?")  # the source of a table that was sent before


class DraftTable(BaseModel):
    name: str
    columns: list[str] = Field(description="The first ones.")
    rows: list[list[str]] = Field(description="The first rows, each cell as a text.")
    splits: dict[str, str] = Field(description="train, validation and test: where the examples come from.")


class DraftGuess(BaseModel):
    kind: str = Field(description="Of the task.")
    columns: dict[str, str | list[str]] = Field(description="By their roles.")
    labels: dict[str, int] = Field(description="Classes with their rows, among `rows`.")
    candidates: list[str] = Field(description="Other columns that may be the label.")
    rows: int = Field(description="That were looked at.")
    more: bool = Field(description="Whether the table has more.")


class Drafted(BaseModel):
    name: str | None = Field(description="Of the adapter.")
    recipe: str | None = Field(description="TOML with comments; null if `problem` says why.")
    notes: list[str]
    table: DraftTable
    guess: DraftGuess | None
    problem: str | None


def draft(view: View, owner: str, source: str, files: Mapping[str, bytes], settings: Mapping[str, str]) -> Drafted:
    """The draft for a table that a client sends, or has sent before.

    Args:
        owner: whose files there are.
        files: name -> content of tables that are sent now.
        settings: of the recipe, that are known.
    """
    with _sent(view, owner, source, files) as (found, tables):
        made = view.services.previews.draft(found, tables, settings)
    made["problem"] = None if made["problem"] is None else without_paths(made["problem"])
    return Drafted.model_validate(made)


def plan(view: View, owner: str, recipe: Recipe, files: Mapping[str, bytes]) -> JsonObject:
    """The plan of a recipe for such a table."""
    recipe, own = _on_own_base(view, recipe)
    with _with_data(view, owner, recipe, files) as (recipe, tables):
        return view.services.previews.plan(view.workspace.store, recipe, tables, own)


def submit(view: View, owner: str, recipe: Recipe, files: Mapping[str, bytes], priority: int = 0) -> JsonObject:
    """Put a training on such a table into the queue. Returns the run."""
    recipe, own = _on_own_base(view, recipe)
    with _with_data(view, owner, recipe, files) as (recipe, tables):
        return view.workspace.queue.submit_sent(recipe, tables, priority=priority, own_base=own)


def log(view: View, run: JsonMapping, past: int = 0) -> Sequence[JsonObject]:
    """The lines of a run's worker, without paths of this machine; none of a run that was not queued.

    Args:
        past: the `id` of the last line that is known.
    """
    found = [] if run["queue"] is None else view.workspace.queue.log(run["id"], past)
    return [{**each, "line": without_paths(str(each["line"]))} for each in found]


def _on_own_base(view: View, recipe: Recipe) -> tuple[Recipe, str | None]:
    """The recipe with the id of a base of this server, if it names one, and that id."""
    own = next((each.id for each in view.engines.bases if recipe.base in (each.name, each.id)), None)
    return (recipe if own is None else recipe.model_copy(update={"base": own})), own


@contextmanager
def _with_data(
    view: View, owner: str, recipe: Recipe, files: Mapping[str, bytes]
) -> Iterator[tuple[Recipe, SentFiles]]:
    with _sent(view, owner, recipe.data.source, files) as (source, tables):
        yield recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})}), tables


@contextmanager
def _sent(view: View, owner: str, source: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, SentFiles]]:
    """The tables of a client by name, and the source among them. One that was sent before is `ID/NAME`.

    Raises:
        NotFound: the sender has no such file.
    """
    found = SENT.fullmatch(source)
    if found is None or source in files:
        yield source, files
        return
    file = view.services.files.find(owner, found[1])
    if file.purpose != TABLE:
        raise BadRequest(f"{file.id} has the purpose {file.purpose}: expected a file of the purpose {TABLE}")
    with view.services.files.content(file) as path:
        named = f"{file.id}/{file.name}"
        yield named, {named: path}
