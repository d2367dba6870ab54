"""What every file of routes begins with: a router that says what it may answer, strict JSON, the served object."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from turret.server import bodies
from turret.server.limits import MOST_UNIT
from turret.server.pending_answers import Answer, made_tokens, prompt_tokens
from turret.server.schemas import Error, Usage
from turret.server.state import ServerState

_BEARER = HTTPBearer(auto_error=False, description="A token of `turret token create`.")
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Error, "description": "What was wrong, in OpenAI's shape."},
    "5XX": {"model": Error, "description": "What the server could not do, in OpenAI's shape."},
}


def _served(request: Request) -> ServerState:
    found: ServerState = request.app.state.served
    return found


Here = Annotated[ServerState, Depends(_served)]
_UNIT = "Whose request it is, such as a user's id: what an experiment assigns. Goes before the body's `user`."


def _unit(turret_unit: Annotated[str | None, Header(max_length=MOST_UNIT, description=_UNIT)] = None) -> str | None:
    """As UTF-8 where it is, else as HTTP has it; None where nothing was said."""
    if not turret_unit:
        return None
    try:
        return turret_unit.encode("latin-1").decode()
    except UnicodeDecodeError:
        return turret_unit


Unit = Annotated[str | None, Depends(_unit)]


class ReadRequest(Request):
    """A request whose body was read already."""

    value: Any = None  # of the route's model; FastAPI takes it as it is

    async def json(self) -> Any:
        return self.value


class StrictRoute(APIRoute):
    """A route whose body is JSON as the standard has it (UTF-8, no NaN), within the limits, and read off the event loop
    where it is large."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler, field = super().get_route_handler(), self.body_field

        async def handle(request: Request) -> Response:
            given = ReadRequest(request.scope, request.receive, request._send)
            if field is not None and (content := await given.body()):
                here = _served(request)
                small = len(content) <= bodies.INLINE
                reading = (content, field, here.limits)
                given.value = bodies.read(*reading) if small else await here.reading(bodies.read, *reading)
            return await handler(given)

        return handle


def router(scope: str) -> APIRouter:
    """Routes that need a token with the scope; the guard sees to it, and this says so."""
    return APIRouter(
        route_class=StrictRoute, responses=PROBLEMS, tags=[scope], dependencies=[Security(_BEARER)] if scope else []
    )


def usage(answers: Sequence[Answer]) -> Usage | None:
    """What OpenAI calls usage; None where the engine does not count prompts."""
    if not all("prompt_tokens" in answer for answer in answers):
        return None
    read, made = sum(map(prompt_tokens, answers)), sum(map(made_tokens, answers))
    return Usage(prompt_tokens=read, completion_tokens=made, total_tokens=read + made)
