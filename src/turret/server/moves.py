"""Moves of aliases, and the end of an experiment, as the control plane and the console make them.

A version is loaded before an alias names it, so that no request waits for the load. Then this server follows the move.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from turret.errors import BadReference, BadRequest, ReplayNeeded
from turret.server.error_responses import without_paths
from turret.server.services import View
from turret.store import Gate, Move
from turret.workspace.experimenting import ExperimentStatus


@dataclass(frozen=True)
class AliasHere:
    """An alias in the store and on this server."""

    name: str
    alias: str
    version: str  # in the store
    serving: str | None  # the version in force here; None if it is of another base
    problem: str | None  # why the two differ
    moved: str


async def list_here(view: View, name: str | None = None) -> list[AliasHere]:
    """Every alias, or those of one adapter."""
    _, found = await view.control(view.workspace.store.pointing)
    return [
        AliasHere(
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
    """The version that an alias means on this server now."""
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
    _check_gates(require)
    exact = str(await view.control(view.workspace.resolve, reference))
    if alias == view.services.settings.alias or view.aliases.version_of(exact.partition("@")[0], alias):
        await view.control(view.engines.warm, exact)
    move = await _moved(view, exact, alias, require, replay)
    await view.control(view.refresh)
    return move


async def _moved(view: View, exact: str, alias: str, require: Sequence[str], replay: bool) -> Move:
    if not replay:
        with suppress(ReplayNeeded):
            return await view.control(view.workspace.store.promote, exact, alias, require=require)
    return await view.promoting(
        view.workspace.promote, exact, alias, require=require, replay=replay, ask=view.golden_answers
    )


def _check_gates(texts: Sequence[str]) -> None:
    """Raises BadRequest: a malformed gate is an error of the request, not an unknown name."""
    try:
        for text in texts:
            Gate.parse(text)
    except BadReference as error:
        raise BadRequest(str(error)) from None


async def roll_back(view: View, name: str, alias: str) -> Move:
    """Move an alias back to the version that it named before."""
    move = await view.control(view.workspace.rollback, name, alias)
    await view.control(view.refresh)
    return move


def load(view: View, references: Sequence[str]) -> None:
    """Load versions. Blocks."""
    for each in references:
        view.engines.warm(str(view.workspace.resolve(view.aliases.exact(each))))


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
