"""Forms as browsers send them, with the check that a form comes from a page of this session."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.datastructures import UploadFile

from turret.errors import BadRequest, Forbidden
from turret.server.auth import READS, Caller
from turret.server.limits import FILES
from turret.server.routes import PageRoute, View
from turret.server.uploads import read_form

MOST_FIELDS = 64
INLINE = 8 << 10  # bytes; a larger form is read on a thread
TOKEN = "form_token"
_ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")
_BYTES = {
    f"{high}{low}".encode(): bytes.fromhex(high + low)
    for high in "0123456789abcdefABCDEF"
    for low in "0123456789abcdefABCDEF"
}


class Form:
    """The fields of one form. A missing field is empty.

    Args:
        file: the one that the form sends.
    """

    def __init__(self, fields: Mapping[str, list[str]], file: UploadFile | None = None) -> None:
        self._fields, self.file = fields, file

    @property
    def names(self) -> Collection[str]:
        """Of the fields."""
        return self._fields.keys()

    def text(self, name: str) -> str:
        """The last value of a field, without blanks around it."""
        return self.raw(name).strip()

    def raw(self, name: str) -> str:
        """The last value of a field."""
        return self._fields.get(name, [""])[-1]

    def all(self, name: str) -> list[str]:
        return self._fields.get(name, [])


async def read(request: Request, view: View) -> Form:
    """The form in the body. Raises BadRequest if it is malformed, Forbidden without the session's form token."""
    form = await (_with_file(request) if request.url.path in FILES else _without_file(request, view))
    caller: Caller = request.state.caller
    token = request.headers.get("x-form-token") or form.text(TOKEN)
    if not view.services.guard.sessions.is_form_token(caller.session, token):
        raise Forbidden("this form is not from this session, and nothing was done: reload the page and send it again")
    return form


async def _without_file(request: Request, view: View) -> Form:
    content = await request.body()
    try:
        return form_of(content) if len(content) <= INLINE else await view.parsing(form_of, content)
    except ValueError:
        raise BadRequest(f"the form cannot be read: expected UTF-8 and at most {MOST_FIELDS} fields") from None


async def _with_file(request: Request) -> Form:
    fields: dict[str, list[str]] = {}
    files: list[UploadFile] = []
    for name, value in (await read_form(request)).multi_items():
        if isinstance(value, UploadFile):
            files.append(value)
        else:
            fields.setdefault(name, []).append(value)
    return Form(fields, next((each for each in files if each.filename), None))


def form_of(content: bytes) -> Form:
    """The form in a body, as browsers encode it. Raises ValueError: too many fields, or not UTF-8.

    `urllib.parse.parse_qs` takes microseconds for each `%`, also if no number follows it.
    """
    if content.count(b"&") >= MOST_FIELDS:
        raise ValueError("too many fields")
    fields: dict[str, list[str]] = {}
    for part in content.split(b"&"):
        name, equals, value = part.partition(b"=")
        if name or equals:
            fields.setdefault(_decoded(name), []).append(_decoded(value))
    return Form(fields)


def _decoded(text: bytes) -> str:
    return _ESCAPED.sub(lambda found: _BYTES[found[1]], text.replace(b"+", b" ")).decode("utf-8")


async def _check_writes(request: Request, view: View) -> None:
    if request.method not in READS:
        await read(request, view)


Sent = Annotated[Form, Depends(read)]


def pages() -> APIRouter:
    """A router for pages. It checks the form token of every write, also if the route does not read the form."""
    return APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[Depends(_check_writes)])
