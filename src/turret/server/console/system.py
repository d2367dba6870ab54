"""The page of the store and of this server's traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from fastapi import Request, Response

from turret.errors import Forbidden
from turret.server.console import render, snippets
from turret.server.console.forms import pages
from turret.server.questions import now
from turret.server.routes import View
from turret.store import Version

router = pages()


@router.get("/store")
async def show(request: Request, view: View) -> Response:
    """The contents of the store, and the traffic."""
    versions = await view.control(view.workspace.list)
    stored = {
        "where": str(view.workspace.store) if view.access.operates else f"tenant {view.access.tenant}",
        "names": len({each.name for each in versions}),
        "versions": len(versions),
        "bytes": sum(each.bytes for each in versions),
        "runs": len(await view.control(view.workspace.runs)),
        "problems": await view.control(view.workspace.store.problems),
    }
    values = await view.control(_traffic, view)
    return render.page(
        request, view, "store.html.j2", stored=stored, example=_example(request, view, versions), **values
    )


@router.get("/store/traffic")
async def traffic(request: Request, view: View) -> Response:
    """The live part: the traffic of each version, and the engine's own figures."""
    versions = await view.control(view.workspace.list)
    values = await view.control(_traffic, view)
    return render.page(request, view, "traffic.html.j2", example=_example(request, view, versions), **values)


@router.post("/store/verify")
async def verify(request: Request, view: View) -> Response:
    """Hash and open all files again."""
    found = await view.control(view.workspace.verify)
    return render.page(request, view, "verified.html.j2", found=found, what="the store")


@router.post("/store/gc")
async def leftovers(request: Request, view: View) -> Response:
    """List what a gc would remove from the whole store. It removes nothing."""
    if not view.access.operates:
        raise Forbidden("the files of a store belong to all its tenants: an admin of the tenant default may list them")
    found = await view.control(view.workspace.gc, dry_run=True)
    return render.page(request, view, "leftovers.html.j2", found=found)


def _example(request: Request, view: View, versions: Sequence[Version]) -> str:
    """A request to a version of this server, as a shell takes it."""
    here = [each for each in versions if view.engines.is_on_base(each)]
    chosen = next((each for each in here if each.aliases or each.comparison is None), here[0] if here else None)
    if chosen is None:
        return snippets.curl(request, view, snippets.question(view.engines.bases[0].name, {}))
    plain = view.aliases.version_of(chosen.name, None) == chosen.number
    asked = snippets.question(chosen.name if plain else str(chosen), chosen.task)
    return snippets.curl(request, view, asked)


def _traffic(view: View) -> render.Context:
    return {
        "traffic": view.metrics.traffic(view.engines.sees),
        "engines": {name: asdict(each) for name, each in view.engines.stats().items()} if view.access.operates else {},
        "memory": [asdict(each) for each in view.engines.loaded()],
        "in_flight": max(0, view.in_flight - 1),  # without this page's own request
        "failed_moves": {key: each for key, each in view.aliases.failed_moves.items() if view.engines.sees(key[0])},
        "since": now() - view.services.started_at,
    }
