"""The playground: what a person asks several versions, as requests to the routes of the API.

The form becomes a `Question` for each version. The question is sent to its route and shown as code, so the page, the
line for a shell and the Python ask the same. Versions are asked by number, so no experiment counts these requests.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from fastapi import Response
from pydantic import Field, ValidationError
from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.data import source
from turret.data.table_writer import escape_formula
from turret.errors import BadRequest, DataError, NotFound, TooLarge, TurretError
from turret.json_types import JsonMapping, JsonObject, JsonValue
from turret.methods import method_named
from turret.server.console import render, snippets
from turret.server.console.render import TOKEN, Form, Page, Sent, pages
from turret.server.console.snippets import QUESTIONS, Question, Snippet
from turret.server.limits import MOST_MESSAGES, MOST_TEXT, MOST_TOKENS
from turret.server.questions import scores_pairs
from turret.server.routes import Model, RequestState, View, answer_of_route, check_counts, overflows, pass_to_route
from turret.store import Version
from turret.tasks import stored_task
from turret.tasks.shapes import TaskSpec
from turret.tasks.task import RequestKind

# --- what the form says -----------------------------------------------------------------------------------------------
# What the form of the playground says: for each version a request to a route of the API.


ALTERNATIVES = 3  # to each token, where probabilities are shown
MOST_ROWS = 300
MOST_TABLE = 400_000  # characters of a table in the page
MODES = {"text": "One input", "chat": "Chat", "file": "A file"}


@dataclass(frozen=True)
class Number:
    """A setting of a generation: its key in the API, and its field."""

    key: str
    label: str
    low: float
    high: float
    usual: str = ""


NUMBERS = (
    Number("max_tokens", "Most tokens", 1, MOST_TOKENS, "80"),
    Number("temperature", "Temperature", 0, 2, "0"),
    Number("top_p", "Top p", 0, 1),
    Number("top_k", "Top k", 1, 100_000),
    Number("repetition_penalty", "Repetition penalty", 0.1, 10),
    Number("presence_penalty", "Presence penalty", -2, 2),
    Number("frequency_penalty", "Frequency penalty", -2, 2),
    Number("num_beams", "Beams", 1, 16),
    Number("seed", "Seed", 1 - (1 << 53), (1 << 53) - 1),
)


class CalledFunction(Model):
    name: str
    arguments: str


class Call(Model):
    """A call of a tool."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Turn(Model):
    """A turn of a conversation."""

    role: Literal["user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class Thread(Model):
    """The conversation with one model, without the system's turn."""

    model: str
    messages: Annotated[list[Turn], Field(max_length=MOST_MESSAGES)] = Field(default_factory=list)

    @property
    def open_calls(self) -> list[Call]:
        """The calls whose results come next."""
        return (self.messages[-1].tool_calls or []) if self.messages else []

    def as_json_text(self) -> str:
        return self.model_dump_json(exclude_none=True)


class Table(Model):
    """The first rows of a table that was sent. The page has it, and no server keeps it. more: than these rows."""

    name: str
    columns: Annotated[list[str], Field(min_length=1, max_length=100)]
    rows: Annotated[list[list[str]], Field(min_length=1, max_length=MOST_ROWS)]
    more: bool = False

    def column(self, name: str) -> list[str]:
        """The cells of a column. Raises BadRequest."""
        if name not in self.columns or any(len(row) != len(self.columns) for row in self.rows):
            raise BadRequest(f"the table has no column {ascii(name)[:60]}: choose one")
        place = self.columns.index(name)
        return [row[place] for row in self.rows]


@dataclass(frozen=True)
class Kind:
    """How a model answers. scores: two texts, with a number."""

    request: RequestKind
    pairs: bool = False
    scores: bool = False

    @classmethod
    def of(cls, task: TaskSpec) -> Kind:
        """That of a task, as in a manifest."""
        return cls(stored_task(task).request, bool(task.get("pairs")), scores_pairs(task))


def mode_of(form: Form) -> str:
    return form.text("as") or "text"


def model_of(form: Form) -> str:
    if not form.text("model"):
        raise BadRequest("no version is chosen: choose one")
    return form.text("model")


def _text(form: Form) -> str:
    text = form.raw("text").replace("\r\n", "\n")
    if not text.strip() or len(text) > MOST_TEXT:
        raise BadRequest(f"the text has {len(text)} characters: expected 1 to {MOST_TEXT}")
    return text


def _lines(form: Form, name: str) -> list[str]:
    return [line for line in form.raw(name).splitlines() if line.strip()]


def _number(setting: Number, text: str) -> int | float:
    for kind in (int, float):
        with suppress(ValueError):
            if setting.low <= (value := kind(text)) <= setting.high:  # nan is neither
                return value
    raise BadRequest(f"{setting.label}: {ascii(text)[:40]} is no number from {setting.low} to {setting.high}")


def _json(view: View, form: Form, name: str) -> JsonValue:
    """A field of JSON; None if it is empty."""
    text = form.text(name)
    if not text:
        return None
    check_counts(text.encode("utf-8", "replace"), view.services.limits)
    try:
        value: JsonValue = from_json(text, allow_inf_nan=False)
        if overflows(value):
            raise ValueError("Out of range float values are not JSON compliant")
    except ValueError as error:
        raise BadRequest(f"{name}: not JSON: {error}") from None
    return value


def _settings(view: View, form: Form) -> JsonObject:
    """The settings of a generation that are filled in, as the API takes them."""
    found: JsonObject = {each.key: _number(each, text) for each in NUMBERS if (text := form.text(each.key))}
    if stops := _lines(form, "stop"):
        found["stop"] = stops
    if (schema := _json(view, form, "schema")) is not None:
        found["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if (bias := _json(view, form, "logit_bias")) is not None:
        found["logit_bias"] = bias
    return found


def thread_of(form: Form, model: str) -> tuple[Thread, list[Turn]]:
    """The conversation with a model so far, and the turns that the form adds: results of tools, and what is said."""
    earlier = Thread(model=model)
    for text in filter(None, form.all("thread")):
        try:
            found = Thread.model_validate_json(text)
        except ValidationError:
            raise BadRequest("the conversation cannot be read: reload the page and begin again") from None
        if found.model == model:
            earlier = found
    added: list[Turn] = []
    results = {call.id: form.raw(f"result:{call.id}") for call in earlier.open_calls}
    if any(map(str.strip, results.values())):
        added += [Turn(role="tool", content=text, tool_call_id=id) for id, text in results.items()]
    if form.text("text") or not earlier.messages:
        added.append(Turn(role="user", content=_text(form)))
    turns = [*earlier.messages, *added]
    if len(turns) > MOST_MESSAGES - (turns[-1].role != "assistant"):  # the answer is a turn too
        raise BadRequest(f"the conversation has {len(turns)} turns: expected under {MOST_MESSAGES}, begin a new one")
    return earlier, added


def table_of(form: Form) -> Table | None:
    """The table in the page, without rows that have no text; None if none was sent yet."""
    if not form.raw("table"):
        return None
    try:
        table = Table.model_validate_json(form.raw("table"))
    except ValidationError:
        raise BadRequest("the table in the page cannot be read: send the file again") from None
    if not form.text("text_column"):
        return table
    texts = table.column(form.text("text_column"))
    rows = [row for row, text in zip(table.rows, texts, strict=True) if text.strip()]
    if not rows:
        raise BadRequest(f"the column {ascii(form.text('text_column'))[:60]} has no texts: choose another one")
    return table.model_copy(update={"rows": rows})


# --- questions --------------------------------------------------------------------------------------------------------


def question_of(view: View, form: Form, model: str, kind: Kind) -> Question:
    """The request that the form means for a model."""
    if mode_of(form) == "chat":
        return _chat(view, form, model)
    if mode_of(form) == "file":
        return _of_rows(view, form, model, kind)
    if kind.request == "generate":
        return _completion(view, form, model)
    text, second = _text(form), form.raw("second").replace("\r\n", "\n")
    if kind.scores or (kind.request == "embed" and second.strip()):
        documents = _lines(form, "second")
        if not documents:
            raise BadRequest("this version gives two texts a number: fill in the second input")
        return Question("rerank", {"model": model, "query": text, "documents": documents}, None, 'answer["results"]')
    usual = QUESTIONS[kind.request]
    asked = {"text": text, "text_pair": second} if kind.pairs and second.strip() else text
    return replace(usual, body={"model": model, "input": asked})


def _completion(view: View, form: Form, model: str) -> Question:
    body = {"model": model, "prompt": _text(form), **_settings(view, form)}
    return replace(QUESTIONS["generate"], body=body | ({"logprobs": ALTERNATIVES} if form.text("logprobs") else {}))


def _chat(view: View, form: Form, model: str) -> Question:
    earlier, added = thread_of(form, model)
    system = [{"role": "system", "content": form.raw("system")}] if form.text("system") else []
    messages = [*system, *(turn.model_dump(exclude_none=True) for turn in (*earlier.messages, *added))]
    body: JsonObject = {"model": model, "messages": messages, **_settings(view, form)}
    if form.text("logprobs"):
        body |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
    if (tools := _json(view, form, "tools")) is not None:
        body |= {"tools": tools, "tool_choice": form.text("tool_choice") or "auto"}
    said = "answer.choices[0].message" if tools else "answer.choices[0].message.content"
    return Question("chat/completions", body, "chat.completions.create", said)


def _of_rows(view: View, form: Form, model: str, kind: Kind) -> Question:
    """One request with a text, or two, of every row."""
    table = table_of(form)
    if table is None:
        raise BadRequest("no table is here: send a file first")
    texts, second = table.column(form.text("text_column")), form.text("second_column")
    if kind.request == "generate":
        return replace(QUESTIONS["generate"], body={"model": model, "prompt": texts, **_settings(view, form)})
    others = table.column(second) if second else None
    if kind.scores or kind.request == "embed":
        if others is None:
            raise BadRequest("this version compares two texts: choose the column of the second one")
        return Question("score", {"model": model, "text_1": texts, "text_2": others}, None, 'answer["data"]')
    inputs: list[JsonValue] = list(texts)
    if kind.pairs and others is not None:
        inputs = [{"text": one, "text_pair": other} for one, other in zip(texts, others, strict=True)]
    return replace(QUESTIONS["classify"], body={"model": model, "input": inputs}, answer='answer["data"]')


router = pages()
MOST = 6  # versions in one question
SHOWN = 200  # versions to choose from
MOST_CODE = 16 << 10  # bytes of a request that is also shown as code
MOST_FILE = 4 << 20  # bytes


# --- answers ----------------------------------------------------------------------------------------------------------


def _token(text: str, logprob: float, likely: Iterable[tuple[str, float]]) -> render.Context:
    """A token with its probability, and the likely ones at its place. level: from 0, surprising, to 4."""
    share, shares = math.exp(logprob), (f"{ascii(each)[1:-1]} {math.exp(value):.0%}" for each, value in likely)
    return {"text": text, "share": share, "likely": ", ".join(shares), "level": min(4, int(5 * share))}


@dataclass(frozen=True)
class Cell:
    """The answer for a row of a table. share: the probability of the label."""

    text: str
    share: float | None = None

    @classmethod
    def of(cls, data: JsonMapping) -> Cell:
        """One answer of a route, as one line where that is possible."""
        if "text" in data:
            return cls(data["text"])
        number = data.get("score", data.get("value"))
        if number is not None:
            return cls(render.number(number))
        if data["spans"] is not None:
            return cls("; ".join(f"{span['label']}: {span['text']}" for span in data["spans"]))
        if data["answers"] is not None:
            return cls("; ".join(f"{question}: {one['label']}" for question, one in data["answers"].items()))
        label = data["label"]
        return cls(label, data["probabilities"][label]) if isinstance(label, str) else cls(", ".join(label))


@dataclass(frozen=True)
class Answered:
    """The answer of a route, as the API gives it. loading: seconds that a load took, if it was needed."""

    question: Question
    status: int
    found: JsonMapping
    headers: Mapping[str, str]
    seconds: float
    loading: float | None

    @property
    def problem(self) -> str | None:
        return str(self.found["error"]["message"]) if self.status >= 400 else None

    @property
    def version(self) -> str:
        name = self.headers.get("turret-adapter")
        return f"{name}@{self.headers['turret-version']}" if name else str(self.question.body["model"])

    @property
    def turn(self) -> Turn | None:
        """The assistant's next turn, of a chat."""
        if "messages" not in self.question.body or self.problem:
            return None
        said = self.found["choices"][0]["message"]
        return Turn.model_validate({key: said.get(key) for key in ("role", "content", "tool_calls")})

    @property
    def tokens(self) -> list[render.Context]:
        """Of a generated text, if probabilities were asked for."""
        given = self.found["choices"][0].get("logprobs") or {}
        if "content" in given:
            return [
                _token(each["token"], each["logprob"], ((o["token"], o["logprob"]) for o in each["top_logprobs"]))
                for each in given["content"]
            ]
        columns = (given.get(key, ()) for key in ("tokens", "token_logprobs", "top_logprobs"))
        return [_token(text, own, others.items()) for text, own, others in zip(*columns, strict=True)]

    @property
    def cells(self) -> list[Cell]:
        """Of the rows of a table."""
        return [Cell.of(each) for each in self.found.get("choices") or self.found["data"]]


@dataclass(frozen=True)
class Panel:
    """What one model was asked, and its place for the answer.

    Args:
        thread: the conversation as the next turn continues it; None outside chats.
        turns: of that conversation, with those that are asked now.
        route: of the page, that answers `fields`; empty if nothing is asked.
    """

    model: str
    thread: Thread | None = None
    turns: Sequence[Turn] = ()
    route: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    snippets: Sequence[Snippet] = ()
    answered: Answered | None = None
    problem: str | None = None


async def _panel(page: Page, form: Form, model: str, kind: Kind | TurretError) -> Panel:
    """The panel of one model. Without scripts it is answered at once."""
    try:
        if isinstance(kind, TurretError):
            raise kind
        found, asked = await page.view.parsing(_plan_panel, page, form, model, kind)
        later = page.live and mode_of(form) != "file"
        if asked is None or not found.route or later:
            return found
        state: RequestState = page.request.scope["state"].copy()
        answered = await _answer(page, asked, state)
    except TurretError as error:
        return Panel(model, problem=render.problem_and_status(error)[0])
    if (turn := answered.turn) is not None:
        thread = Thread(model=model, messages=[*found.turns, turn])
        found = replace(found, thread=thread)
    return replace(found, answered=answered, problem=answered.problem)


def _plan_panel(page: Page, form: Form, model: str, kind: Kind) -> tuple[Panel, Question | None]:
    """The panel before the answer, and the question; None if a conversation is only shown."""
    left_out = (TOKEN, "thread", "code", "model", "table")
    fields = {name: form.raw(name) for name in form if name not in left_out and ":" not in name}
    fields["model"] = model
    found = Panel(model, route="stream" if kind.request == "generate" else "answer", fields=fields)
    if mode_of(form) == "chat":
        earlier, added = thread_of(form, model)
        turns = [*earlier.messages, *added]
        fields |= {"text": "", "thread": Thread(model=model, messages=turns).as_json_text()}
        found = replace(found, thread=earlier, turns=turns)
        if not added and turns[-1].role == "assistant":
            return replace(found, route=""), None
    question = question_of(page.view, form, model, kind)
    if len(json.dumps(question.body)) <= MOST_CODE:
        found = replace(found, snippets=snippets.of_question(page.request, page.view, question))
    return (replace(found, route="") if form.text("code") else found), question


async def _answer(page: Page, question: Question, state: RequestState) -> Answered:
    """Ask the question's route. state: of the request that the route sees; a quota counts each of them once."""
    loading = await _load(page.view, str(question.body["model"]))
    started, content = page.view.services.clock(), json.dumps(question.body).encode()
    path = f"/v1/{question.route}"
    status, headers, body = await answer_of_route(page.request.app, path, content, state, page.request.receive)
    return Answered(question, status, json.loads(body), headers, page.view.services.clock() - started, loading)


class Streamed(Response):
    """The stream of a route of the API, passed on as it comes, with the time of the load in a header."""

    def __init__(self, app: ASGIApp, question: Question, loading: float | None) -> None:
        super().__init__()
        self._app, self._question, self._loading = app, question, loading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and self._loading is not None:
                header = (b"turret-load-seconds", f"{self._loading:.6f}".encode())
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        body = self._question.body | {"stream": True, "stream_options": {"include_usage": True}}
        path = f"/v1/{self._question.route}"
        await pass_to_route(self._app, path, json.dumps(body).encode(), scope["state"], receive, send_on)


async def _load(view: View, model: str) -> float | None:
    """Load the version if necessary, and return the seconds that took; None for the base or a version in memory."""
    if view.engines.is_base(model):
        return None
    version = await view.control(view.workspace.resolve, model)
    if view.engines.in_memory(version.digest):
        return None
    started = view.services.clock()
    await view.control(view.engines.warm, str(version))
    return view.services.clock() - started


# --- pages ------------------------------------------------------------------------------------------------------------


@router.get("/playground")
async def show(page: Page) -> Response:
    """The form, with the versions to choose from."""
    given = page.request.query_params.multi_items()
    return await _page(page, Form([(key, value) for key, value in given if key in ("as", "model")]))


@router.post("/playground")
async def ask(page: Page, view: View, form: Sent) -> Response:
    """A panel for each version. With scripts each panel then sends its own request; without, all are answered here."""
    models = form.all("model")
    if not 1 <= len(models) <= MOST:
        wrong = BadRequest(f"{len(models)} versions are chosen: expected 1 to {MOST}")
        if page.live:
            raise wrong
        return await _page(page, form, error=wrong)
    kinds = await view.control(_kinds, view, models)
    found = await asyncio.gather(*(_panel(page, form, *each) for each in zip(models, kinds, strict=True)))
    if page.live:
        name = "playground_table.html.j2" if mode_of(form) == "file" else "playground_answers.html.j2"
        return page.show(name, panels=found, **_of_table(form, found))
    return await _page(page, form, found)


@router.post("/playground/answer")
async def answer(page: Page, view: View, form: Sent) -> Response:
    """One answer, with its time and the time of its load."""
    model = model_of(form)
    if mode_of(form) == "file":
        raise BadRequest("the rows of a file have no answer of their own: ask them by the form of the playground")
    (kind,) = await view.control(_kinds, view, [model])
    if isinstance(kind, TurretError):
        raise kind
    question = await view.parsing(question_of, view, form, model, kind)
    found = await _answer(page, question, page.request.scope["state"])
    if found.problem:
        return Response(json.dumps(found.found), found.status, media_type="application/json")
    return page.show("answer.html.j2", each=found)


@router.post("/playground/stream")
async def stream(page: Page, view: View, form: Sent) -> Response:
    """One generation, streamed by its route, with the time of its load in a header."""
    model = model_of(form)
    question = await view.parsing(question_of, view, form, model, Kind("generate"))
    return Streamed(page.request.app, question, await _load(view, model))


@router.post("/playground/file")
async def upload(page: Page, view: View, form: Sent) -> Response:
    """The form for the rows of a table. Nothing of it is stored."""
    filled = {"as": "file"}
    try:
        if form.file is None or not form.file.filename:
            raise BadRequest("no file is chosen: choose a table")
        content = await form.file.read(MOST_FILE + 1)
        if len(content) > MOST_FILE:
            raise TooLarge(f"the file has more than {MOST_FILE} bytes: send fewer rows")
        found = await view.preview(view.services.previews.sample, form.file.filename, content, MOST_ROWS + 1)
        if not found["rows"]:
            raise DataError("the table has no rows: send one that has")
        rows, more = found["rows"][:MOST_ROWS], len(found["rows"]) > MOST_ROWS
        table = Table(name=found["name"], columns=found["columns"], rows=rows, more=more).model_dump_json()
        if len(table) > MOST_TABLE:
            raise TooLarge(
                f"the first {len(rows)} rows have over {MOST_TABLE} characters: send fewer, or shorter texts"
            )
    except TurretError as error:
        return await _page(page, Form(filled), error=error)
    return await _page(page, Form(filled | {"table": table}))


def _of_table(form: Form, panels: Sequence[Panel]) -> render.Context:
    """What a page shows of a table: it, the answers, and both as a file that a spreadsheet reads."""
    table = table_of(form)
    answered = [each.answered for each in panels if each.answered and not each.problem]
    if table is None or not answered:
        return {"table": table, "answered": ()}
    column, heads, written = form.text("text_column"), list(table.columns), [list(row) for row in table.rows]
    for each in answered:
        shares = any(cell.share is not None for cell in each.cells)
        heads += [each.version, f"{each.version} probability"] if shares else [each.version]
        for row, cell in zip(written, each.cells, strict=True):
            row += [cell.text, f"{cell.share or 0:.4f}"] if shares else [cell.text]
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(map(escape_formula, row) for row in (heads, *written))
    content = base64.b64encode(file.getvalue().encode("utf-8-sig")).decode()
    cells = zip(*(each.cells for each in answered), strict=True)  # of each row
    lines = list(zip(table.column(column), cells, strict=True))
    return {"table": table, "answered": answered, "lines": lines, "column": column, "csv": content}


async def _page(page: Page, form: Form, panels: Sequence[Panel] = (), error: TurretError | None = None) -> Response:
    mode = mode_of(form)
    if mode not in MODES:
        raise NotFound(f"no such playground: expected {' or '.join(MODES)}")
    every = [(each, Kind.of(each.task)) for each in await _versions(page.view)]
    bases = [(each.name, _kind_of_base(page.view, each.name)) for each in page.view.engines.askable]
    versions = [(each, kind) for each, kind in every if mode != "chat" or kind.request == "generate"]
    named = [str(each) for each, _ in versions if each.aliases][:2] or [str(each) for each, _ in versions[:1]]
    bare = [name for name, kind in bases if mode != "chat" or kind.request == "generate"]
    kinds = [kind for _, kind in (*versions, *bases)]
    shown = _of_table(form, panels)
    table: Table | None = shown["table"]
    values = {
        "mode": mode,
        "modes": MODES,
        "stored": bool(every),
        "versions": [each for each, _ in versions[:SHOWN]],
        "bare": bare,
        "chosen": form.all("model") or named or bare[:1],
        "most": MOST,
        "numbers": NUMBERS,
        "generating": any(each.request == "generate" for each in kinds),
        "two": any(each.pairs or each.request == "embed" for each in kinds),
        "asked": form,
        "panels": panels,
        "formats": source.SUFFIXES,
        "most_rows": MOST_ROWS,
        "most_file": MOST_FILE,
        **shown,
        "likely": None if table is None else max(table.columns, key=lambda name: sum(map(len, table.column(name)))),
    }
    said = mode == "chat" and any(each.answered for each in panels)
    kept = Form([(name, value) for name, value in form.multi_items() if name != "text" or not said])
    return page.show("playground.html.j2", error=error, form=kept if TOKEN in form else None, **values)


def _kinds(view: View, models: Sequence[str]) -> list[Kind | TurretError]:
    """How each model answers, or why it cannot. Reads the store."""
    found: list[Kind | TurretError] = []
    for model in models:
        try:
            bare = view.engines.is_base(model)
            task = {} if bare else view.workspace.resolve(model).task
            found.append(_kind_of_base(view, model) if bare else Kind.of(task))
        except NotFound as error:
            found.append(view.missing_model(model, error))
        except TurretError as error:
            found.append(error)
    return found


def _kind_of_base(view: View, model: str) -> Kind:
    heads = view.engines.base_of(model).engine.base.family.head_kinds
    return Kind("generate" if "generate" in heads else "embed")


async def _versions(view: View) -> list[Version]:
    """The versions that the engine can load.

    Those with an alias are first, those of comparisons last, and the newest first among equals.
    """
    found = [
        each
        for each in await view.control(view.workspace.list)
        if view.engines.is_on_base(each) and method_named(each.method.get("kind")).mixes(each.method)
    ]
    return sorted(found, key=lambda each: (not each.aliases, each.comparison is not None, each.name, -each.number))
