"""`/healthz`, `/readyz` and `/metrics`: is it alive, may it be asked, what has it done."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import JSONResponse, PlainTextResponse

from turret.errors import Draining
from turret.server.error_responses import problem
from turret.server.metrics import CONTENT_TYPE
from turret.server.routes import Here, router

anyone, control = router(""), router("admin")


@anyone.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@anyone.get("/readyz")
async def readyz(here: Here) -> Response:
    """It may be sent requests: it has followed the store, loaded ahead, and is not going down."""
    if here.load.draining or not here.ready:
        said = "going down" if here.load.draining else "not ready yet: adapters are being loaded"
        told = problem(Draining(f"the server is {said}"))
        return JSONResponse(told.body, told.status, told.headers)
    return JSONResponse({"status": "ready"})


@control.get("/metrics", response_class=PlainTextResponse)
async def metrics(here: Here) -> Response:
    """Figures for Prometheus."""
    return Response(await here.control(here.metrics.text), media_type=CONTENT_TYPE)
