"""The page of the store and of this server's traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from fastapi import Request, Response

from turret.errors import Forbidden
from turret.server.console import render, snippets
from turret.server.console.forms import pages
from turret.server.routes import State
from turret.server.state import ServerState
from turret.store import Version

router = pages()


@router.get("/store")
async def show(request: Request, state: State) -> Response:
    """The contents of the store, and the traffic."""
    versions = await state.control(state.workspace.list)
    stored = {
        "where": str(state.workspace.store) if state.access.operates else f"tenant {state.access.tenant}",
        "names": len({each.name for each in versions}),
        "versions": len(versions),
        "bytes": sum(each.bytes for each in versions),
        "runs": len(await state.control(state.workspace.runs)),
        "problems": await state.control(state.workspace.store.problems),
    }
    values = await state.control(_traffic, state)
    return render.page(
        request, state, "store.html.j2", stored=stored, example=_example(request, state, versions), **values
    )


@router.get("/store/traffic")
async def traffic(request: Request, state: State) -> Response:
    """The live part: the traffic of each version, and the engine's own figures."""
    versions = await state.control(state.workspace.list)
    values = await state.control(_traffic, state)
    return render.page(request, state, "traffic.html.j2", example=_example(request, state, versions), **values)


@router.post("/store/verify")
async def verify(request: Request, state: State) -> Response:
    """Hash and open all files again."""
    found = await state.control(state.workspace.verify)
    return render.page(request, state, "verified.html.j2", found=found, what="the store")


@router.post("/store/gc")
async def leftovers(request: Request, state: State) -> Response:
    """List what a gc would remove from the whole store. It removes nothing."""
    if not state.access.operates:
        raise Forbidden("the files of a store belong to all its tenants: an admin of the tenant default may list them")
    found = await state.control(state.workspace.gc, dry_run=True)
    return render.page(request, state, "leftovers.html.j2", found=found)


def _example(request: Request, state: ServerState, versions: Sequence[Version]) -> str:
    """A request to a version of this server, as a shell takes it."""
    here = [each for each in versions if state.engines.is_on_base(each)]
    chosen = next((each for each in here if each.aliases or each.comparison is None), here[0] if here else None)
    if chosen is None:
        return snippets.curl(request, state, snippets.question(state.engines.bases[0].name, {}))
    plain = state.aliases.version_of(chosen.name, None) == chosen.number
    asked = snippets.question(chosen.name if plain else str(chosen), chosen.part("task"))
    return snippets.curl(request, state, asked)


def _traffic(state: ServerState) -> render.Context:
    return {
        "traffic": state.metrics.traffic(state.engines.sees),
        "engines": {name: asdict(each) for name, each in state.engines.stats().items()}
        if state.access.operates
        else {},
        "memory": [asdict(each) for each in state.engines.loaded()],
        "in_flight": max(0, state.in_flight - 1),  # without this page's own request
        "failed_moves": {key: each for key, each in state.aliases.failed_moves.items() if state.engines.sees(key[0])},
        "since": state.now() - state.started_at,
    }
