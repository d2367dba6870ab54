"""The store's health and this server's traffic: what is stored, is it whole, who is asked, what is in memory."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from turret.server.routes import Here
from turret.server.state import ServerState, said
from turret.server.web import render
from turret.server.web.forms import pages

router = pages()


@router.get("/store")
async def show(request: Request, here: Here) -> Response:
    """What is stored, and what this server does."""
    versions = await here.control(here.workspace.list)
    stored = {
        "where": str(here.workspace.store),
        "names": len({each.name for each in versions}),
        "versions": len(versions),
        "bytes": sum(each.bytes for each in versions),
        "runs": len(await here.control(here.workspace.runs)),
        "problems": await here.control(here.workspace.store.problems),
    }
    return render.page(request, here, "store.html.j2", stored=stored, **_traffic(here))


@router.get("/store/traffic")
async def traffic(request: Request, here: Here) -> Response:
    """The live part: answers of each version, and what the engine holds."""
    return render.page(request, here, "traffic.html.j2", **_traffic(here))


@router.post("/store/verify")
async def verify(request: Request, here: Here) -> Response:
    """Hash and open everything again."""
    found = await here.control(here.workspace.verify)
    return render.page(request, here, "verified.html.j2", found=found, what="the store")


@router.post("/store/gc")
async def leftovers(request: Request, here: Here) -> Response:
    """What a gc would remove; it removes nothing."""
    found = await here.control(here.workspace.gc, dry_run=True)
    return render.page(request, here, "leftovers.html.j2", found=found)


def _traffic(here: ServerState) -> dict[str, Any]:
    return {
        "traffic": here.metrics.traffic(),
        "engine": said(here.engine.stats()),
        "memory": [said(each) for each in here.engine.loaded()],
        "in_flight": max(0, here.load.requests - 1),  # this page is one
        "trouble": here.follow.trouble,
        "since": here.now() - here.began,
    }
