"""The application: routes behind the doors, in the order in which a request meets them.

    log and request id -> page or API -> one way to read it -> who asks -> how much -> route

Refuses to know sockets; `run.py` has those.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp

from turret import __version__
from turret.errors import TurretError
from turret.server import admin, chat, classify, completions, experiments, health, models
from turret.server.auth import Guarded
from turret.server.error_responses import ErrorResponse, by_status, invalid, problem
from turret.server.headers import Unambiguous
from turret.server.limits import Bounded
from turret.server.logs import Logged
from turret.server.state import ServerState
from turret.server.web import adapters, comparisons, entry, playground, runs, system
from turret.server.web import experiments as experiment_pages
from turret.server.web.page_middleware import PageMiddleware

ROUTERS = (
    models.questions,
    completions.questions,
    chat.questions,
    classify.questions,
    admin.control,
    experiments.control,
    experiments.outcomes,
    health.control,
    health.anyone,
    entry.router,
    adapters.router,
    runs.router,
    comparisons.router,
    playground.router,
    experiment_pages.router,
    system.router,
)


def create(served: ServerState) -> ASGIApp:
    """The whole server as an ASGI application."""
    bounded = Bounded(routes(served), served.limits, served.load, served.clients)
    doors = PageMiddleware(Unambiguous(Guarded(bounded, served.guard)))
    return Logged(doors, served.log, served.metrics.request, served.clock)


def routes(served: ServerState) -> FastAPI:
    """The routes alone; `/openapi.json` says what they take and give."""
    app = FastAPI(
        title="Turret",
        version=__version__,
        docs_url=None,  # its pages come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.served = served
    for each in ROUTERS:
        app.include_router(each)

    @app.exception_handler(TurretError)
    async def refused(request: Request, error: TurretError) -> Response:
        told = problem(error)
        if told.status >= 500:
            served.log.say("failed", "error", request=_id(request), error=type(error).__name__, message=str(error))
        return _encoded(told, getattr(request.state, "receipt", None))

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> Response:
        return _encoded(invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        told = by_status(error.status_code, str(error.detail))
        return _encoded(told, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return _encoded(problem(error), getattr(request.state, "receipt", None))  # it is raised on to the log

    return app


def _id(request: Request) -> Any:
    return request.scope.get("state", {}).get("request_id")


def _encoded(told: ErrorResponse, more: dict[str, str] | None = None) -> Response:
    return Response(told.encoded(), told.status, {**told.headers, **(more or {})})
