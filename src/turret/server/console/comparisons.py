"""The pages of comparisons: the reports of `turret compare` and `turret control`."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request, Response
from fastapi.responses import HTMLResponse

from turret.errors import NotFound
from turret.server.console import render
from turret.server.console.forms import pages
from turret.server.routes import View

router = pages()
Key = Annotated[str, Path(min_length=1, max_length=250)]
# A report needs no other file. It runs no script, and only our own pages may show it in a frame.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)


@router.get("/comparisons")
async def listing(request: Request, view: View) -> Response:
    """All reports in the store."""
    found = await view.control(view.workspace.comparisons)
    return render.page(request, view, "comparisons.html.j2", found=found)


@router.get("/comparisons/{key}")
async def show(request: Request, view: View, key: Key) -> Response:
    """One report inside a page."""
    found = [each for each in await view.control(view.workspace.comparisons) if each["key"] == key]
    if not found:
        raise NotFound(f"no comparison {ascii(key)[:60]}: `turret compare` makes one")
    return render.page(request, view, "comparison.html.j2", one=found[0])


@router.get("/comparisons/{key}/report")
async def report(view: View, key: Key) -> Response:
    """The report itself."""
    text = await view.control(view.workspace.report, key)
    return HTMLResponse(text, headers={"content-security-policy": REPORT_POLICY, "x-frame-options": "SAMEORIGIN"})
