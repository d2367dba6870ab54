"""Comparisons: the reports that `turret compare` and `turret control` wrote, listed and opened in the page."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request, Response
from fastapi.responses import HTMLResponse

from turret.errors import NotFound
from turret.server.routes import Here
from turret.server.web import render
from turret.server.web.forms import pages

router = pages()
Key = Annotated[str, Path(min_length=1, max_length=250)]
# A report is one page that needs nothing but itself: it runs no script, and is shown inside ours alone.
REPORT = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
REPORT += "frame-ancestors 'self'"


@router.get("/comparisons")
async def listing(request: Request, here: Here) -> Response:
    """Every report in the store."""
    return render.page(request, here, "comparisons.html.j2", found=await here.control(here.workspace.comparisons))


@router.get("/comparisons/{key}")
async def show(request: Request, here: Here, key: Key) -> Response:
    """One report, in the page."""
    found = [each for each in await here.control(here.workspace.comparisons) if each["key"] == key]
    if not found:
        raise NotFound(f"no comparison {ascii(key)[:60]}: `turret compare` makes one")
    return render.page(request, here, "comparison.html.j2", one=found[0])


@router.get("/comparisons/{key}/report")
async def report(here: Here, key: Key) -> Response:
    """The report itself, as it was written."""
    text = await here.control(here.workspace.report, key)
    return HTMLResponse(text, headers={"content-security-policy": REPORT, "x-frame-options": "SAMEORIGIN"})
