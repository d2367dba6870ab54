"""The page of the store and of this server's traffic."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import Request, Response

from turret.errors import Forbidden
from turret.server.routes import State
from turret.server.state import ServerState
from turret.server.web import render
from turret.server.web.forms import pages

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
    return render.page(request, state, "store.html.j2", stored=stored, **await state.control(_traffic, state))


@router.get("/store/traffic")
async def traffic(request: Request, state: State) -> Response:
    """The live part: the traffic of each version, and the engine's own figures."""
    return render.page(request, state, "traffic.html.j2", **await state.control(_traffic, state))


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


def _traffic(state: ServerState) -> render.Context:
    return {
        "traffic": state.metrics.traffic(state.engines.sees),
        "engines": {name: asdict(each) for name, each in state.engines.stats().items()}
        if state.access.operates
        else {},
        "memory": [asdict(each) for each in state.engines.loaded()],
        "in_flight": max(0, state.load.requests - 1),  # without this page's own request
        "failed_moves": {key: each for key, each in state.aliases.failed_moves.items() if state.engines.sees(key[0])},
        "since": state.now() - state.started_at,
    }
