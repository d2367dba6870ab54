"""`/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

from functools import partial

from fastapi import Response
from fastapi.responses import JSONResponse

from turret.errors import Draining
from turret.server.error_responses import error_response
from turret.server.metrics import CONTENT_TYPE
from turret.server.routes import State, router

anyone, control = router(""), router("admin or metrics")


@anyone.get("/healthz")
async def healthz() -> dict[str, str]:
    """200 while the process answers."""
    return {"status": "ok"}


@anyone.get("/readyz")
async def readyz(state: State) -> Response:
    """200 once the store was read and adapters are loaded; 503 before that, and while the server shuts down."""
    if state.load.draining or not state.ready:
        why = "shutting down" if state.load.draining else "not ready yet: adapters are being loaded"
        response = error_response(Draining(f"the server is {why}"))
        return JSONResponse(response.body, response.status, response.headers)
    return JSONResponse({"status": "ready"})


@control.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
async def metrics(state: State) -> Response:
    """Metrics for Prometheus: of the tenant's adapters; for the tenant `default`, of the server and all tenants too."""
    read = partial(state.metrics.text, state.engines.sees, operates=state.access.operates)
    return Response(await state.control(read), media_type=CONTENT_TYPE)
