"""Moves of aliases, their gates, promises, and experiments, as the control plane and the console make them.

A version is loaded before an alias names it, so that no request waits for the load. Then this server follows the move.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from turret.errors import ReplayNeeded
from turret.experiments import Guards
from turret.experiments.experiment import LONGEST_TTL, MISSING_BOUND, MOST_ARMS, MOST_MISSING, OUTCOME_TTL
from turret.server.error_responses import without_paths
from turret.server.routes import AliasName, GateText, Model, Reference, Share, Shares, find_file
from turret.server.services import View
from turret.store import Move
from turret.store.client_files import TABLE
from turret.store.gates import GateStatus
from turret.workspace.experimenting import ExperimentStatus
from turret.workspace.promising import PromiseStatus

# --- what is asked ----------------------------------------------------------------------------------------------------

_METRIC = r"^(binary|-?[0-9]{1,9}(\.[0-9]{1,9})?\.\.-?[0-9]{1,9}(\.[0-9]{1,9})?)$"


class GuardsAsked(Model):
    worse_by: Annotated[float, Field(ge=0, le=1e15)] | None = Field(
        default=0.0, description="Roll back an arm that is worse by more than this; null: never because of outcomes."
    )
    max_errors: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_seconds: Annotated[float, Field(gt=0, le=1e6)] | None = None
    promote: bool = False


class StartRequest(Model):
    """As in `turret experiment start`."""

    # An experiment needs a candidate or a shadow.
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [{"required": [key], "properties": {key: {"minItems": 1}}} for key in ("candidates", "shadows")]
        }
    )
    candidates: Annotated[list[Reference], Field(max_length=MOST_ARMS, fail_fast=True)] = Field(default_factory=list)
    control: Reference | None = Field(None, description="Default: the version that the alias names.")
    shadows: Annotated[list[Reference], Field(max_length=MOST_ARMS, fail_fast=True)] = Field(default_factory=list)
    share: Shares | None = Field(None, description="Of the candidates together, or by arm.")
    steps: Annotated[list[Share], Field(min_length=1, max_length=32, fail_fast=True)] | None = Field(
        None, description="Planned shares, rising."
    )
    metric: Annotated[str, Field(max_length=60, pattern=_METRIC)] = "binary"
    goal: Literal["higher", "lower"] = "higher"
    unit: Literal["user", "session", "request"] = "user"
    alpha: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    outcome_ttl: Annotated[float, Field(ge=1, le=LONGEST_TTL)] = Field(
        OUTCOME_TTL, description="Seconds after the first answer to a unit in which its outcome counts."
    )
    missing_bound: Annotated[float, Field(ge=0, le=MOST_MISSING)] = Field(
        MISSING_BOUND,
        description="A verdict must hold even if this share of an arm's units sent no outcome because it was bad.",
    )
    guards: GuardsAsked = Field(default_factory=GuardsAsked)
    alias: AliasName = "production"


class GateRequest(Model):
    """As in `turret gate`."""

    alias: AliasName = "production"
    add: Annotated[list[GateText], Field(max_length=32, fail_fast=True)] = Field(
        default_factory=list, description="Such as accuracy>=0.9."
    )
    remove: Annotated[list[Annotated[str, Field(min_length=1, max_length=300)]], Field(max_length=32)] = Field(
        default_factory=list, description="A gate, all gates of a metric, or a set of golden examples by its name."
    )
    golden: Annotated[str, Field(min_length=1, max_length=200_000)] | None = Field(
        None, description="Golden examples as CSV: text, and label, equals or contains."
    )
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Of them that must pass; null: all.")


class PromiseAsked(Model):
    """As in `turret promise`."""

    error: Annotated[float, Field(gt=0, le=0.5)] = Field(description="At most this share is wrong.")
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    metric: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        "error", description="Of the decided answers; or misses:LABEL, precision:LABEL."
    )
    source: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        None, description="Labelled examples: the id of a file of `/v1/files`. Null: those that the training held out."
    )
    when_broken: Literal["alarm", "stricter", "rollback"] = "alarm"
    outcome_ttl: Annotated[float, Field(ge=1, le=LONGEST_TTL)] = OUTCOME_TTL
    missing_bound: Annotated[float, Field(ge=0, le=MOST_MISSING)] = MISSING_BOUND


# --- aliases ----------------------------------------------------------------------------------------------------------


class Alias(BaseModel):
    name: str
    alias: str
    version: str = Field(description="The version in the store.")
    serving: str | None = Field(description="The version in force here; null if it is of another base.")
    problem: str | None = Field(description="Why the two differ.")
    moved: str


async def list_here(view: View, name: str | None = None) -> list[Alias]:
    """Every alias, or those of one adapter."""
    return await view.control(_list_here, view, name)


def _list_here(view: View, name: str | None) -> list[Alias]:
    _, found = view.workspace.store.pointing()
    return [
        Alias(
            name=each.name,
            alias=each.alias,
            version=f"{each.name}@{each.number}",
            serving=serving(view, each.name, each.alias),
            problem=_problem(view, each.name, each.alias),
            moved=each.moved,
        )
        for each in found
        if name in (None, each.name)
    ]


def serving(view: View, name: str, alias: str) -> str | None:
    """The version that an alias means on this server now. May read the store."""
    number = view.aliases.version_of(name, alias)
    return None if number is None else f"{name}@{number}"


def _problem(view: View, name: str, alias: str) -> str | None:
    failed = view.aliases.failed_moves.get((name, alias))
    return None if failed is None else without_paths(f"{failed.version}: {failed.problem}")


async def move_alias(
    view: View, reference: str, alias: str, *, require: Sequence[str] = (), replay: bool = False
) -> Move:
    """Move an alias to a version. The version is loaded first; nothing moves if that fails.

    Args:
        require: Gates, besides those of the adapter.
        replay: Whether golden examples are asked again that the version has answered before.
    """
    exact = str(await view.control(view.workspace.resolve, reference))
    name = exact.partition("@")[0]
    if alias == view.services.settings.alias or await view.control(serving, view, name, alias) is not None:
        await view.control(view.engines.warm, exact)
    move = await _promote_version(view, exact, alias, require, replay)
    await view.control(view.refresh)
    return move


async def _promote_version(view: View, exact: str, alias: str, require: Sequence[str], replay: bool) -> Move:
    if not replay:
        with suppress(ReplayNeeded):
            return await view.control(view.workspace.store.promote, exact, alias, require=require)
    return await view.promoting(
        view.workspace.promote, exact, alias, require=require, replay=replay, ask=view.golden_answers
    )


async def roll_back(view: View, name: str, alias: str) -> Move:
    """Move an alias back to the version that it named before."""
    move = await view.control(view.workspace.rollback, name, alias)
    await view.control(view.refresh)
    return move


def load(view: View, references: Sequence[str]) -> None:
    """Load versions. Blocks."""
    for each in references:
        view.engines.warm(str(view.workspace.resolve(view.aliases.exact(each))))


async def start_experiment(view: View, name: str, asked: StartRequest) -> ExperimentStatus:
    """Start an experiment. Its versions are loaded first; nothing starts if that fails."""
    await view.control(view.workspace.resolve, name)
    versions = [*asked.candidates, *asked.shadows] + ([asked.control] if asked.control is not None else [])
    await view.control(load, view, versions)
    settings = asked.model_dump(exclude={"guards", "candidates"}) | {"guards": Guards(**asked.guards.model_dump())}
    return await view.control(view.workspace.experiment(name).start, asked.candidates, **settings)


async def end_experiment(
    view: View, name: str, number: int | None, *, promote: str | None, rollback: bool
) -> ExperimentStatus:
    """End an experiment.

    Args:
        promote: The arm that takes the alias. Its version is loaded first, and the serving engine is asked its golden
            examples on a thread of their own, because that may take minutes.
        rollback: Whether the control takes the alias.
    """
    experiment = view.workspace.experiment(name, number)
    if promote is None or rollback:
        return await view.control(experiment.stop, promote=promote, rollback=rollback)
    running = (await view.control(experiment.status)).experiment
    arm = running.arm(promote)
    await view.control(load, view, [running.reference(arm)])
    return await view.promoting(experiment.stop, promote=arm.name, ask=view.golden_answers)


# --- gates and promises -----------------------------------------------------------------------------------------------
# They wait for the store or for another process: call them on a thread.


def change_gates(view: View, name: str, asked: GateRequest) -> Sequence[GateStatus]:
    """Add and remove gates of an alias. Returns all gates of the name, and whether each passes now."""
    view.workspace.resolve(name)
    with golden_file(asked.golden) as golden:
        view.workspace.gate(name, asked.alias, add=asked.add, remove=asked.remove, golden=golden, share=asked.share)
    return view.workspace.gate_status(name)


@contextmanager
def golden_file(text: str | None) -> Iterator[Path | None]:
    """Golden examples of a request as a table."""
    if text is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="turret-golden-") as folder:
        path = Path(folder) / "golden.csv"
        path.write_text(text, "utf-8")
        yield path


def make_promise(view: View, owner: str, reference: str, asked: PromiseAsked) -> PromiseStatus:
    """Have a version answer labelled examples in another process, and keep the promise that they carry."""
    version = str(view.workspace.resolve(view.aliases.exact(reference)))
    request = asked.model_dump(exclude={"source"})
    if asked.source is None:
        view.services.previews.promise(view.workspace.store, version, request)
    else:
        file = find_file(view, owner, asked.source, TABLE)
        with view.services.files.content(file) as path:
            view.services.previews.promise(view.workspace.store, version, request, path, file.name)
    return view.workspace.promise(version)
