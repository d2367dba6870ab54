"""The ASGI application: the routes behind the middleware, in the order in which a request meets it.

log and request id -> other origins -> token and scope -> limits -> route
"""

from __future__ import annotations

import json
from functools import partial

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match
from starlette.types import ASGIApp

from turret import __version__
from turret.errors import Draining, TurretError
from turret.json_types import JsonObject
from turret.server import (
    accounts,
    admin,
    batches,
    chat,
    classify,
    completions,
    embeddings,
    experiments,
    files,
    models,
    responses,
    runs,
    tokenizer,
)
from turret.server.auth import AuthMiddleware, Guard, allow_origins
from turret.server.error_responses import ErrorResponse, error_response, status_response, validation_response
from turret.server.limits import LimitMiddleware
from turret.server.logs import LogMiddleware, TraceMiddleware
from turret.server.metrics import CONTENT_TYPE
from turret.server.routes import State, router
from turret.server.state import ServerState
from turret.server.web import adapters, comparisons, entry, playground, render, system
from turret.server.web import experiments as experiment_pages
from turret.server.web import runs as run_pages

# --- health -----------------------------------------------------------------------------------------------------------
# `/healthz`, `/readyz` and `/metrics`.


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


# --- app --------------------------------------------------------------------------------------------------------------


ROUTERS = (
    models.questions,
    completions.questions,
    chat.questions,
    classify.questions,
    embeddings.questions,
    responses.questions,
    files.questions,
    batches.questions,
    tokenizer.questions,
    admin.control,
    accounts.control,
    runs.control,
    experiments.control,
    experiments.outcomes,
    control,
    anyone,
    entry.router,
    adapters.router,
    run_pages.router,
    comparisons.router,
    playground.router,
    experiment_pages.router,
    system.router,
)


def create(state: ServerState, application: FastAPI | None = None) -> ASGIApp:
    """The whole server as an ASGI application. application: the routes, if they are made already."""
    limited = LimitMiddleware(application or routes(state), state.limits, state.load, state.clients)
    origins = state.settings.origins
    guarded = AuthMiddleware(limited, state.guard, render.PageResponse, state.replica.look_up_session, origins)
    logged = LogMiddleware(allow_origins(guarded, origins), state.log, state.metrics.request, state.clock)
    return logged if state.spans is None else TraceMiddleware(logged, state.spans)


class _Application(FastAPI):
    """FastAPI, whose description asks for no token while the server is open."""

    guard: Guard | None = None  # None while the reference is written

    def openapi(self) -> JsonObject:
        described = super().openapi()
        if self.guard is None or not self.guard.open:
            return described
        without: JsonObject = json.loads(json.dumps(described))
        without["components"].pop("securitySchemes", None)
        for operations in without["paths"].values():
            for operation in operations.values():
                operation.pop("security", None)
        return without


def routes(state: ServerState) -> FastAPI:
    """The routes without the middleware. `/openapi.json` describes them."""
    app = _Application(
        title="Turret",
        version=__version__,
        docs_url=None,  # its pages load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server, app.guard = state, getattr(state, "guard", None)
    for each in ROUTERS:
        app.include_router(each)

    @app.exception_handler(TurretError)
    async def on_error(request: Request, error: TurretError) -> Response:
        response = error_response(error)
        if response.status >= 500:
            request_id = request.scope.get("state", {}).get("request_id")
            state.log.write("failed", "error", request=request_id, error=type(error).__name__, message=str(error))
        return _encoded(response, getattr(request.state, "receipt", None))

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> Response:
        return _encoded(validation_response(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # of all routes with this path, not of the first one alone
            found = [
                route for each in ROUTERS for route in each.routes if route.matches(request.scope)[0] is not Match.NONE
            ]
            headers["Allow"] = ", ".join(sorted({name for route in found for name in getattr(route, "methods", ())}))
        return _encoded(status_response(error.status_code, str(error.detail)), headers)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return _encoded(error_response(error), getattr(request.state, "receipt", None))  # the log middleware logs it

    return app


def _encoded(response: ErrorResponse, headers: dict[str, str] | None = None) -> Response:
    return Response(response.encoded(), response.status, {**response.headers, **(headers or {})})
