"""A form as a browser sends it, and proof that it is one of ours. Every route of a page that writes depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Request

from turret.errors import BadRequest, Forbidden
from turret.server.auth import READS, Asker
from turret.server.routes import Here

MOST_FIELDS = 64
TOKEN = "form_token"


class Form:
    """The fields of one form."""

    def __init__(self, fields: Mapping[str, list[str]]) -> None:
        self._fields = fields

    def text(self, name: str) -> str:
        """The one value of that name, blanks around it aside; empty where there is none."""
        return self._fields.get(name, [""])[-1].strip()

    def raw(self, name: str) -> str:
        return self._fields.get(name, [""])[-1]

    def all(self, name: str) -> list[str]:
        return self._fields.get(name, [])


async def read(request: Request, here: Here) -> Form:
    """Raises BadRequest for what is no form, Forbidden for one that is not ours."""
    try:
        text = (await request.body()).decode("utf-8")
        form = Form(parse_qs(text, keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="strict"))
    except ValueError:
        raise BadRequest(f"the form cannot be read: expected UTF-8 and at most {MOST_FIELDS} fields") from None
    asker: Asker = request.state.asker
    sent = request.headers.get("x-form-token") or form.text(TOKEN)
    if not here.guard.sessions.is_ours(asker.session, sent):
        raise Forbidden("this form is not from this session, and nothing was done: reload the page and send it again")
    return form


async def _checked(request: Request, here: Here) -> None:
    if request.method not in READS:
        await read(request, here)


Sent = Annotated[Form, Depends(read)]


def pages() -> APIRouter:
    """Routes of pages: whatever writes there proves that it is ours, whether or not it reads the form."""
    return APIRouter(include_in_schema=False, dependencies=[Depends(_checked)])
