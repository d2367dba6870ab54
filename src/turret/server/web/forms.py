"""Forms as browsers send them, with the check that a form comes from a page of this session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Request

from turret.errors import BadRequest, Forbidden
from turret.server.auth import READS, Caller
from turret.server.routes import State

MOST_FIELDS = 64
TOKEN = "form_token"


class Form:
    """The fields of one form. A missing field is empty."""

    def __init__(self, fields: Mapping[str, list[str]]) -> None:
        self._fields = fields

    def text(self, name: str) -> str:
        """The last value of a field, without blanks around it."""
        return self.raw(name).strip()

    def raw(self, name: str) -> str:
        """The last value of a field."""
        return self._fields.get(name, [""])[-1]

    def all(self, name: str) -> list[str]:
        return self._fields.get(name, [])


async def read(request: Request, state: State) -> Form:
    """The form in the body. Raises BadRequest if it is malformed, Forbidden without the session's form token."""
    try:
        text = (await request.body()).decode("utf-8")
        form = Form(parse_qs(text, keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="strict"))
    except ValueError:
        raise BadRequest(f"the form cannot be read: expected UTF-8 and at most {MOST_FIELDS} fields") from None
    caller: Caller = request.state.caller
    token = request.headers.get("x-form-token") or form.text(TOKEN)
    if not state.guard.sessions.is_form_token(caller.session, token):
        raise Forbidden("this form is not from this session, and nothing was done: reload the page and send it again")
    return form


async def _check_writes(request: Request, state: State) -> None:
    if request.method not in READS:
        await read(request, state)


Sent = Annotated[Form, Depends(read)]


def pages() -> APIRouter:
    """A router for pages. It checks the form token of every write, also if the route does not read the form."""
    return APIRouter(include_in_schema=False, dependencies=[Depends(_check_writes)])
