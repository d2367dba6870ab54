"""Moves of aliases, and the end of an experiment, as the control plane and the console make them.

A version is loaded before an alias names it, so that no request waits for the load. Then this server follows the move.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from turret.errors import BadReference, BadRequest, ReplayNeeded
from turret.server.error_responses import without_paths
from turret.server.state import ServerState
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


async def list_here(state: ServerState, name: str | None = None) -> list[AliasHere]:
    """Every alias, or those of one adapter."""
    _, found = await state.control(state.workspace.store.pointing)
    return [
        AliasHere(
            name=each.name,
            alias=each.alias,
            version=f"{each.name}@{each.number}",
            serving=serving(state, each.name, each.alias),
            problem=_problem(state, each.name, each.alias),
            moved=each.moved,
        )
        for each in found
        if name in (None, each.name)
    ]


def serving(state: ServerState, name: str, alias: str) -> str | None:
    """The version that an alias means on this server now."""
    number = state.aliases.version_of(name, alias)
    return None if number is None else f"{name}@{number}"


def _problem(state: ServerState, name: str, alias: str) -> str | None:
    failed = state.aliases.failed_moves.get((name, alias))
    return None if failed is None else without_paths(f"{failed.version}: {failed.problem}")


async def move_alias(
    state: ServerState, reference: str, alias: str, *, require: Sequence[str] = (), replay: bool = False
) -> Move:
    """Move an alias to a version. The version is loaded first; nothing moves if that fails.

    Args:
        require: Gates, besides those of the adapter.
        replay: Whether golden examples are asked again that the version has answered before.
    """
    _check_gates(require)
    exact = str(await state.control(state.workspace.resolve, reference))
    if alias == state.settings.alias or state.aliases.version_of(exact.partition("@")[0], alias):
        await state.control(state.engines.warm, exact)
    move = await _moved(state, exact, alias, require, replay)
    await state.control(state.refresh)
    return move


async def _moved(state: ServerState, exact: str, alias: str, require: Sequence[str], replay: bool) -> Move:
    if not replay:
        with suppress(ReplayNeeded):
            return await state.control(state.workspace.store.promote, exact, alias, require=require)
    return await state.promoting(
        state.workspace.promote, exact, alias, require=require, replay=replay, ask=state.golden_answers
    )


def _check_gates(texts: Sequence[str]) -> None:
    """Raises BadRequest: a malformed gate is an error of the request, not an unknown name."""
    try:
        for text in texts:
            Gate.parse(text)
    except BadReference as error:
        raise BadRequest(str(error)) from None


async def roll_back(state: ServerState, name: str, alias: str) -> Move:
    """Move an alias back to the version that it named before."""
    move = await state.control(state.workspace.rollback, name, alias)
    await state.control(state.refresh)
    return move


def load(state: ServerState, references: Sequence[str]) -> None:
    """Load versions. Blocks."""
    for each in references:
        state.engines.warm(str(state.workspace.resolve(state.aliases.exact(each))))


async def end_experiment(
    state: ServerState, name: str, number: int | None, *, promote: str | None, rollback: bool
) -> ExperimentStatus:
    """End an experiment.

    Args:
        promote: The arm that takes the alias. Its version is loaded first, and the serving engine is asked its golden
            examples on a thread of their own, because that may take minutes.
        rollback: Whether the control takes the alias.
    """
    experiment = state.workspace.experiment(name, number)
    if promote is None or rollback:
        return await state.control(experiment.stop, promote=promote, rollback=rollback)
    running = (await state.control(experiment.status)).experiment
    arm = running.arm(promote)
    await state.control(load, state, [running.reference(arm)])
    return await state.promoting(experiment.stop, promote=arm.name, ask=state.golden_answers)
