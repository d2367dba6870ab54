"""Forms as browsers send them, with the check that a form comes from a page of this session."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from turret.errors import BadRequest, Forbidden, NotFound
from turret.experiments.experiment import read_duration
from turret.json_types import JsonObject, JsonValue
from turret.server.auth import READS, Caller
from turret.server.error_responses import Problem, validation_response
from turret.server.limits import FILES
from turret.server.routes import PageRoute, View, read_form

MOST_FIELDS = 64
INLINE = 8 << 10  # bytes; a larger form is read on a thread
TOKEN = "form_token"
FILLED = "filled"  # a field of a form whose fields a person has seen
AnyModel = TypeVar("AnyModel", bound=BaseModel)
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


@dataclass(frozen=True)
class Field:
    """A field of a form, for the macro `fields`. What it says goes into the model of a route of the API.

    Args:
        name: of the key in that model; dots lead into its parts.
        value: at first.
        kind: text, number, shares (`5%,0.2`), time (`2h`), words (separated by blanks or commas), gates
            (separated by commas), settings (a line each), table (CSV), check, or choice.
    """

    name: str
    label: str
    help: str = ""
    value: str = ""
    kind: str = "text"
    choices: tuple[str, ...] = ()
    example: str = ""

    def read(self, form: Form) -> JsonValue:
        """The value for the model, which refuses what does not fit; None if the field is empty."""
        text = form.text(self.name)
        if self.kind == "check":
            return bool(text)
        if not text:
            return None
        if self.kind == "settings":
            pairs = (line.partition("=") for line in text.splitlines() if line.strip())
            return {key.strip(): value.strip() for key, _, value in pairs}
        if self.kind == "time":
            return read_duration(text)
        if self.kind == "gates":
            return [re.sub(r"\s*(>=|<=|>|<)\s*", r"\1", each.strip()) for each in text.split(",") if each.strip()]
        if self.kind == "words":
            return text.replace(",", " ").split()
        if self.kind == "shares":
            return [_number(each) for each in text.split(",") if each.strip()]
        return _number(text) if self.kind == "number" else text


def _number(text: str) -> JsonValue:
    """`3`, `0.5` and `5%` as numbers; other texts as they are."""
    text, share = text.strip(), text.strip().endswith("%")
    try:
        return float(text[:-1]) / 100 if share else float(text)
    except ValueError:
        return text


def texts_in(form: Form, fields: Iterable[Field]) -> dict[str, str]:
    """What a person has written, by name; the first values unless this form was sent."""
    sent = FILLED in form.names
    return {each.name: form.raw(each.name) if sent else each.value for each in fields}


def model_in(form: Form, fields: Iterable[Field], model: type[AnyModel]) -> AnyModel:
    """The model that a form says. Raises BadRequest in one line, as the API would."""
    values: JsonObject = {}
    for each in fields:
        if (value := each.read(form)) is not None:
            *parts, last = each.name.split(".")
            reduce(lambda inside, part: inside.setdefault(part, {}), parts, values)[last] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems: list[Problem] = [
            {"type": each["type"], "loc": ("body", *each["loc"]), "msg": each["msg"]}
            for each in error.errors(include_url=False)
        ]
        raise BadRequest(str(validation_response(problems).body["error"]["message"])) from None


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


def require_verb(verb: str, verbs: Collection[str]) -> None:
    """Raise NotFound unless a path ends in one of these words."""
    if verb not in verbs:
        raise NotFound(f"no verb {ascii(verb)[:40]}: expected one of {', '.join(verbs)}")


def pages() -> APIRouter:
    """A router for pages. It checks the form token of every write, also if the route does not read the form."""
    return APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[Depends(_check_writes)])
