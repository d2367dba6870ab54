"""The ASGI application: the routes behind the middleware, in the order in which a request meets it.

log and request id -> page or API -> ambiguous headers -> token and scope -> limits -> route
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp

from turret import __version__
from turret.errors import TurretError
from turret.server import accounts, admin, chat, classify, completions, experiments, health, models
from turret.server.auth import AuthMiddleware
from turret.server.error_responses import ErrorResponse, error_response, status_response, validation_response
from turret.server.headers import HeaderMiddleware
from turret.server.limits import LimitMiddleware
from turret.server.logs import LogMiddleware
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
    accounts.control,
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


def create(state: ServerState) -> ASGIApp:
    """The whole server as an ASGI application."""
    limited = LimitMiddleware(routes(state), state.limits, state.load, state.clients)
    pages = PageMiddleware(HeaderMiddleware(AuthMiddleware(limited, state.guard)))
    return LogMiddleware(pages, state.log, state.metrics.request, state.clock)


def routes(state: ServerState) -> FastAPI:
    """The routes without the middleware. `/openapi.json` describes them."""
    app = FastAPI(
        title="Turret",
        version=__version__,
        docs_url=None,  # its pages load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = state
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
        return _encoded(status_response(error.status_code, str(error.detail)), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return _encoded(error_response(error), getattr(request.state, "receipt", None))  # the log middleware logs it

    return app


def _encoded(response: ErrorResponse, headers: dict[str, str] | None = None) -> Response:
    return Response(response.encoded(), response.status, {**response.headers, **(headers or {})})
