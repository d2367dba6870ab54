"""What the form of the playground says: for each version a request to a route of the API."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_core import from_json

from turret.errors import BadRequest
from turret.json_types import JsonObject, JsonValue
from turret.server.console.forms import Form
from turret.server.console.snippets import QUESTIONS, Question
from turret.server.limits import MOST_MESSAGES, MOST_TEXT, MOST_TOKENS
from turret.server.questions import scores_pairs
from turret.server.routes import Model, View, check_counts
from turret.tasks import stored_task
from turret.tasks.shapes import TaskSpec
from turret.tasks.task import RequestKind

ALTERNATIVES = 3  # to each token, where probabilities are shown
MOST_ROWS = 300
MOST_TABLE = 400_000  # characters of a table in the page
MODES = {"text": "One input", "chat": "Chat", "file": "A file"}


# --- what the form says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A setting of a generation: its key in the API, and its field. The API checks it."""

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

    def written(self) -> str:
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


def _number(name: str, text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text[:40])
        except ValueError:
            continue
    raise BadRequest(f"{name}: {ascii(text)[:40]} is no number")


def _json(view: View, form: Form, name: str) -> JsonValue:
    """A field of JSON; None if it is empty."""
    text = form.text(name)
    if not text:
        return None
    check_counts(text.encode("utf-8", "replace"), view.services.limits)
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"{name}: not JSON: {error}") from None


def _settings(view: View, form: Form) -> JsonObject:
    """The settings of a generation that are filled in, as the API takes them."""
    found: JsonObject = {each.key: _number(each.label, text) for each in NUMBERS if (text := form.text(each.key))}
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
