"""The ASGI application: the routes behind the middleware, in the order in which a request meets it.

log and request id -> other origins -> page or API -> ambiguous headers -> token and scope -> limits -> route
"""

from __future__ import annotations

import json

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match
from starlette.types import ASGIApp

from turret import __version__
from turret.errors import TurretError
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
    health,
    models,
    responses,
    runs,
    tokenizer,
)
from turret.server.auth import AuthMiddleware, Guard
from turret.server.cross_origin import allow_origins
from turret.server.error_responses import ErrorResponse, error_response, status_response, validation_response
from turret.server.headers import HeaderMiddleware
from turret.server.limits import LimitMiddleware
from turret.server.logs import LogMiddleware
from turret.server.session_middleware import SessionMiddleware
from turret.server.state import ServerState
from turret.server.tracing import TraceMiddleware
from turret.server.web import adapters, comparisons, entry, playground, system
from turret.server.web import experiments as experiment_pages
from turret.server.web import runs as run_pages
from turret.server.web.page_middleware import PageMiddleware

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
    health.control,
    health.anyone,
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
    guarded = SessionMiddleware(AuthMiddleware(limited, state.guard, origins), state)
    pages = PageMiddleware(HeaderMiddleware(guarded))
    logged = LogMiddleware(allow_origins(pages, origins), state.log, state.metrics.request, state.clock)
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
