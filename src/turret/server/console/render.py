"""What all pages share: templates with filters for numbers, headers, pages for errors, and forms.

Every value in a template is escaped. A missing name in a template is an error.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import (
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    PackageLoader,
    PrefixLoader,
    StrictUndefined,
    Template,
    select_autoescape,
)
from markupsafe import Markup, escape
from pydantic import AfterValidator, BaseModel, ValidationError
from starlette.datastructures import FormData, Headers, MutableHeaders, UploadFile
from starlette.types import Message, Scope, Send

from turret import amounts, tasks
from turret.compare.report_text import milliseconds, percent
from turret.database import OPEN_STATES
from turret.errors import BadRequest, Forbidden, NotFound, TurretError
from turret.experiments.experiment import read_duration
from turret.json_types import JsonObject, JsonValue, Plain
from turret.methods import describe_method
from turret.server.auth import READS, Caller
from turret.server.error_responses import ErrorResponse, Problem, error_response, validation_response
from turret.server.limits import FILES, MENU
from turret.server.routes import PageRoute, View, owner_of, read_form
from turret.tasks import Measure
from turret.tasks.shapes import Metrics, SplitMetrics, number_in, parts_in
from turret.timestamp import to_minute
from turret.version import __version__

Context: TypeAlias = Mapping[str, Any]  # what a template shows: Jinja takes values of any type
FOLDER = Path(__file__).parent
BADLY_CALIBRATED = 0.1  # of the ECE
FORGETTING = {  # of a version that generates: what it costs on other texts
    "neutral": Measure("neutral text", "increase of the loss of a token on neutral text", "nats"),
    "neutral_low": Measure("neutral text, from", "lower end of the 95% interval", "nats"),
    "neutral_high": Measure("neutral text, to", "upper end of the 95% interval", "nats"),
}


@cache
def digest(file: str) -> str:
    """Of a static file. Its URL contains the digest, so browsers may cache it permanently."""
    return hashlib.sha256((FOLDER / "static" / file).read_bytes()).hexdigest()[:12]


@cache
def _environment() -> Environment:
    reports = PackageLoader("turret.compare", ".")  # the parts of a page that reports have too
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(FOLDER / "templates"), PrefixLoader({"reports": reports})]),
        autoescape=select_autoescape(("j2", "html"), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (age, code, doubts, evidence, main_metric, means, metric, number, percent, points, share, short)
    environment.filters |= {each.__name__: each for each in (*filters, when, whole)}
    environment.filters |= {"bytes": amounts.size, "count": amounts.many, "seconds": amounts.span, "zip": zip}
    environment.filters |= {"method": describe_method, "ms": milliseconds, "said": value_said}
    environment.globals |= {"digest": digest, "pages": MENU, "version_of_turret": __version__}
    environment.globals["open_states"] = OPEN_STATES
    return environment


def template(name: str) -> Template:
    return _environment().get_template(name)


@dataclass(frozen=True)
class AskedPage:
    """A page that a browser asks for, and the server as the caller sees it."""

    request: Request
    view: View

    @property
    def caller(self) -> Caller:
        return self.request.state.caller

    @property
    def owner(self) -> str:
        """Whose files the caller has."""
        return owner_of(self.request)

    @property
    def live(self) -> bool:
        """Whether htmx asks for a part of a page."""
        return "hx-request" in self.request.headers

    # Any: as in `Context`.
    def show(
        self,
        name: str,
        status: int = 200,
        /,
        *,
        error: TurretError | None = None,
        form: Form | None = None,
        **values: Any,
    ) -> HTMLResponse:
        """A template with the values that every page needs, and those of this one.

        Args:
            error: that it tells.
            form: what its fields say; None: their first values.
        """
        common = {
            "caller": self.caller,
            "bases": [each.name for each in self.view.engines.bases],
            "form_token": self.view.services.guard.sessions.form_token(self.caller.session),
            "open": self.view.services.guard.open,
            "live": self.live,
            "problem": None,
        }
        if error is not None:
            values["problem"], status = problem_and_status(error)
        page = template(name).render(common | values)
        return HTMLResponse(page if form is None else fill(page, form), status)

    def redirect(self, url: str) -> Response:
        """Go to another page, for htmx or for a browser without scripts."""
        return Response(headers={"hx-redirect": url}) if self.live else RedirectResponse(url, 303)


def _asked_page(request: Request, view: View) -> AskedPage:
    return AskedPage(request, view)


Page: TypeAlias = Annotated[AskedPage, Depends(_asked_page)]


def problem_and_status(error: TurretError) -> tuple[str, int]:
    """The line of an error as a client may see it, and the status of the page that shows it."""
    response = error_response(error)
    return str(response.body["error"]["message"]), response.status


# --- filters ---------------------------------------------------------------------------------------------------------


def age(moment: str | None) -> str:
    """`just now`, `5 min ago`, `3 days ago`."""
    if not moment:
        return "never"
    passed = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    for size, unit in ((86400, "day"), (3600, "h"), (60, "min")):
        if passed >= size:
            many = int(passed // size)
            return f"{many} {unit}{'s' if unit == 'day' and many > 1 else ''} ago"
    return "just now" if passed < 10 else f"{passed:.0f} s ago"


def when(moment: str | None) -> str:
    """`2026-11-25 10:13 UTC`."""
    return to_minute(moment) if moment else ""


def number(value: Plain) -> str:
    """A measured value with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def evidence(value: float) -> str:
    """Three digits, with a power of ten only from 1e7."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def share(value: float) -> str:
    """`5%`, `12.5%`."""
    return f"{100 * value:.3g}%"


def short(digest: str | None) -> str:
    """The first 12 digits of a digest."""
    return (digest or "").removeprefix("sha256:")[:12]


def main_metric(measured: SplitMetrics, kind: str | None = None) -> tuple[str, str, str] | None:
    """(metric, value, split) of the metric to show if there is room for one. kind: of the task, if it is known."""
    for split in ("test", "validation"):
        values = measured.get(split) or {}
        if (name := tasks.main_metric(values, kind)) is not None:
            return name, metric(values[name], tasks.measure_of(name, values, kind)), split
    return None


def doubts(measured: SplitMetrics, *, broken: bool = False) -> list[tuple[str, str]]:
    """What speaks against a version: a few words, and a sentence that explains them.

    Args:
        measured: its metrics, by split.
        broken: whether outcomes have broken its promise.
    """
    found = [("promise broken", "outcomes of live answers have broken what it promised")] if broken else []
    split = next((each for each in ("test", "validation") if measured.get(each)), None)
    if split is None:
        return found
    values = measured[split]
    counts = {label: each.get("support") or 0 for label, each in parts_in(values, "per_class").items()}
    accuracy = number_in(values, "accuracy")
    if counts and sum(counts.values()) and accuracy is not None:
        label, count = max(counts.items(), key=lambda each: each[1])
        if accuracy <= (most := count / sum(counts.values())):
            right = points(accuracy)
            text = f"{right} of the answers are right, and {points(most)} if every answer were {label!r}"
            found.append(("below the largest class", text))
    own, bare = (number_in(each, "loss") for each in (values, measured.get(f"{split} bare base") or {}))
    if own is not None and bare is not None and own >= bare:
        text = f"its loss is {number(own)}, and that of the bare base {number(bare)}"
        found.append(("below the bare base", text))
    if (ece := number_in(values, "ece") or 0) > BADLY_CALIBRATED:
        text = f"its probabilities differ from the share that is right by {points(ece)} on average (ECE)"
        found.append(("badly calibrated", text))
    return found


def metric(value: Plain, measure: Measure) -> str:
    """A metric: a share in percent, another value as a number."""
    return points(value) if isinstance(value, float) and measure.share else number(value)


def points(value: Plain) -> str:
    """`91.3%`, of a share; nothing for what is no number."""
    return amounts.percentage(value) if isinstance(value, int | float) else ""


def value_said(value: Plain) -> str:
    """Any setting: `none`, a number, or a text of at most 200 characters."""
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def means(key: str, values: Metrics, kind: str | None = None) -> tuple[Measure, str]:
    """How to show a metric, and what it measures with the key that a gate takes."""
    measure = FORGETTING.get(key) or tasks.measure_of(key, values, kind)
    return measure, f"{measure.says} (key: {key})" if measure.says else f"key: {key}"


def code(text: str) -> Markup:
    """A line of text, escaped, with the parts between backquotes as code."""
    parts = str(text).split("`")
    return Markup("").join(
        escape(part) if index % 2 == 0 else Markup("<code>{}</code>").format(part) for index, part in enumerate(parts)
    )


# --- responses --------------------------------------------------------------------------------------------------------
# Strict headers for every page, and errors as pages.


POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer a browser sends no origin with a form
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class PageResponse:
    """Sends one response. The start of a JSON error waits for its body, and both become a page.

    Without a session, the response leads to the sign-in.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._error_start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if message["status"] >= 400 and headers.get("content-type", "").startswith("application/json"):
                self._error_start = message
                return
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        elif self._error_start is not None:
            start, body = _error_page(self._scope, self._error_start, message.get("body", b""))
            self._error_start = None
            await self._send(start)
            message = {**message, "body": body}
        await self._send(message)


def _error_page(scope: Scope, start: Message, body: bytes) -> tuple[Message, bytes]:
    """An error as a page, or as the line that htmx puts into a page. 401 leads to the sign-in."""
    status, message = start["status"], json.loads(body)["error"]["message"]
    caller = scope.get("state", {}).get("caller")
    htmx, given = "hx-request" in Headers(scope=scope), Headers(scope=start)
    headers = {**HEADERS, "content-type": "text/html; charset=utf-8"}
    headers |= {name: given[name] for name in ("retry-after", "connection", "allow") if name in given}
    if status == 401:
        url = f"/sign-in?next={quote(_requested_page(scope), safe='')}"
        headers |= {"hx-redirect": url} if htmx else {"location": url}
        status = status if htmx else 303
    name = "problem.html.j2" if htmx else "error.html.j2"
    text = template(name).render(status=status, message=message, caller=caller).encode()
    headers["content-length"] = str(len(text))
    return {**start, "status": status, "headers": Headers(headers).raw}, text


def _requested_page(scope: Scope) -> str:
    """The page to open after signing in."""
    path, query = scope["path"], scope.get("query_string", b"").decode("latin-1")
    return (f"{path}?{query}" if query else str(path)) if scope["method"] == "GET" else "/"


# --- forms ------------------------------------------------------------------------------------------------------------
# Forms as browsers send them, with the check that a form comes from a page of this session.


MOST_FORM_FIELDS = 64
INLINE = 8 << 10  # bytes; a larger form is read on a thread
TOKEN = "form_token"
AnyModel = TypeVar("AnyModel", bound=BaseModel)
_ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")
_TAG = re.compile(r"<(input|select|option|textarea)\b([^>]*)>(?:([^<]*)(</(?:option|textarea)>))?")
_ATTRIBUTE = re.compile(r'([\w-]+)(?:="([^"]*)")?')
SHORT = 200  # characters of a field that may choose what the page of its form shows


class Form(FormData):
    """The fields of one form. A missing field is empty."""

    @property
    def file(self) -> UploadFile | None:
        """The one that the form sends."""
        return next((each for _, each in self.multi_items() if isinstance(each, UploadFile) and each.filename), None)

    def text(self, name: str) -> str:
        """The last value of a field, without blanks around it."""
        return self.raw(name).strip()

    def raw(self, name: str) -> str:
        """The last value of a field."""
        return (self.all(name) or [""])[-1]

    def all(self, name: str) -> list[str]:
        return [each for each in self.getlist(name) if isinstance(each, str)]


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
            return [each.strip() for each in text.split(",") if each.strip()]
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
        raise BadRequest(str(validation_response(problems, values).body["error"]["message"])) from None


async def read_form_of(request: Request, view: View) -> Form:
    """The form in the body. Raises BadRequest if it is malformed, Forbidden without the session's form token."""
    if request.url.path in FILES:
        form = Form(await read_form(request))
    else:
        form = await _without_file(request, view)
    caller: Caller = request.state.caller
    token = request.headers.get("x-form-token") or form.text(TOKEN)
    if not view.services.guard.sessions.is_form_token(caller.session, token):
        raise Forbidden("this form is not from this session, and nothing was done: reload the page and send it again")
    request.state.form = form
    return form


async def _without_file(request: Request, view: View) -> Form:
    content = await request.body()
    try:
        return form_of(content) if len(content) <= INLINE else await view.parsing(form_of, content)
    except ValueError:
        raise BadRequest(f"the form cannot be read: expected UTF-8 and at most {MOST_FORM_FIELDS} fields") from None


def form_of(content: bytes) -> Form:
    """The form in a body, as browsers encode it. Raises ValueError: too many fields, or not UTF-8.

    `urllib.parse.parse_qs` takes microseconds for each `%`, also if no number follows it.
    """
    if content.count(b"&") >= MOST_FORM_FIELDS:
        raise ValueError("too many fields")
    parts = (part.partition(b"=") for part in content.split(b"&"))
    return Form([(_decode_field(name), _decode_field(value)) for name, equals, value in parts if name or equals])


def _decode_field(text: bytes) -> str:
    return _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), text.replace(b"+", b" ")).decode("utf-8")


async def _check_writes(request: Request, view: View) -> None:
    if request.method not in READS:
        await read_form_of(request, view)


Sent = Annotated[Form, Depends(read_form_of)]


def one_of(*verbs: str) -> AfterValidator:
    """Of a path that ends in one of these words: NotFound for any other."""

    def check(verb: str) -> str:
        if verb not in verbs:
            raise NotFound(f"no verb {ascii(verb)[:40]}: expected one of {', '.join(verbs)}")
        return verb

    return AfterValidator(check)


def pages() -> APIRouter:
    """A router for pages. It checks the form token of every write, also if the route does not read the form."""
    return APIRouter(route_class=FormRoute, include_in_schema=False, dependencies=[Depends(_check_writes)])


# --- a form that was refused ------------------------------------------------------------------------------------------


class FormRoute(PageRoute):
    """A route of the pages. What it refuses of a form comes back as the page of the form, filled in as it was sent.

    That page is the one that GET shows at the same address. htmx changes no form, and gets the line of the error alone.
    """

    # Any, Any: the yield and send types of every coroutine.
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except (TurretError, RequestValidationError) as error:
                told = error_response(error) if isinstance(error, TurretError) else validation_response(error.errors())
                refused = None if "hx-request" in request.headers else await _refused_form(request, told)
                if refused is None:
                    raise
                return refused

        return handle


async def _refused_form(request: Request, told: ErrorResponse) -> Response | None:
    """The page of the form with an error; None if there is no form, or the page cannot be shown either."""
    read = request.method in READS
    form = Form(request.query_params) if read else getattr(request.state, "form", None)
    if not form or told.status == 401 or told.status >= (401 if read else 500):
        return None
    chosen = {} if read else {key: form.raw(key) for key in form if len(form.raw(key)) <= SHORT}
    scope = {**request.scope, "method": "GET", "query_string": urlencode(chosen).encode()}
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await request.app(scope, request.receive, send)
    if sent[0]["status"] != 200:
        return None
    page = fill(b"".join(each.get("body", b"") for each in sent[1:]).decode(), form)
    line = template("problem.html.j2").render(message=told.body["error"]["message"])
    headers = {name: value for name, value in told.headers.items() if name != "content-type"}
    return HTMLResponse(page.replace("<div data-problem>", f"<div data-problem>{line}", 1), told.status, headers)


def fill(page: str, form: Form) -> str:
    """A page whose fields say what a form has sent. Hidden fields, files, and what was not sent stay as they are."""
    select = ""

    def write(found: re.Match[str]) -> str:
        nonlocal select
        tag, written, text, end = found.groups(default="")
        attributes = dict(_ATTRIBUTE.findall(written))  # escaped
        name, kind = html.unescape(attributes.get("name", "")), attributes.get("type", tag)
        if tag == "select":
            select = name
        if kind == "checkbox" or (kind == "option" and select in form):
            mark, name = ("checked", name) if kind == "checkbox" else ("selected", select)
            attributes.pop(mark, None)
            if html.unescape(attributes.get("value", text)) in form.all(name):
                attributes[mark] = mark
        elif tag in ("select", "option") or kind in ("hidden", "file") or name not in form:
            return found[0]
        elif tag == "textarea":
            text = f"\n{escape(form.raw(name))}"
        else:
            attributes["value"] = escape(form.raw(name))
        opened = " ".join([tag, *(f'{key}="{value}"' for key, value in attributes.items())])
        return f"<{opened}>{text}{end}"

    return _TAG.sub(write, page)
