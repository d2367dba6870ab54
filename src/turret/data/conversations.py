"""Reads the cells of a table as conversations: lists of turns with a role, a text and tool calls.

Three formats give the same turns:

- messages: a list of `{"role", "content"}`, as OpenAI writes them, with `tool_calls` and the role `tool`
- ShareGPT: a list of `{"from", "value"}` from `human`, `gpt`, `system`, `function_call` and `observation`
- one question and its answer in columns, as Alpaca has them: an instruction, often an input, and an output
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from turret.data.cells import Missing, RowReader, json_in, text_of
from turret.data.examples import Conversation, Preferred, Prompt, Turn
from turret.data.table import CellValue, is_missing, words_in
from turret.errors import DataError, quote
from turret.json_types import JsonMapping, JsonObject

MOST_TURNS = 10_000
_ROLES = {
    word: role
    for role, words in {
        "system": "system, developer",
        "user": "user, human",
        "assistant": "assistant, gpt, model, bot, chatgpt, function_call, tool_call",
        "tool": "tool, function, observation, ipython, function_response",
    }.items()
    for word in words_in(words)
}
_CALLS = ("function_call", "tool_call")  # roles whose text is a call of a tool


def conversation_in(row: RowReader) -> Conversation:
    """The conversation in a row, from its first question to its last answer. Raises DataError, Missing.

    An answer before the first question, such as a greeting, is left out: nobody asked for it, and many chat templates
    refuse such a conversation.

    Args:
        row: with `messages`, or with `prompt`, `completion` and often `input`; often with `system` and `tools`.
    """
    whole = row.has("messages")
    turns = _turns_asked(row) if whole else [*_turns_asked(row), *_turns_in(row, "completion", "assistant")]
    asked = from_question(turns)
    if len(asked) < len(turns):
        row.changes["answers that begin a conversation are left out"] += any(map(_answers, asked))
    answers = [place for place, turn in enumerate(asked) if _answers(turn)]
    if not answers:
        row.role = "messages" if whole else "completion"
        raise Missing("a question and its answer in " if whole else "")
    if answers[-1] + 1 < len(asked):
        row.changes["turns after the last answer are left out"] += 1
    prompt = _whole_prompt(row, asked[: answers[-1] + 1])
    return Conversation(prompt.turns, prompt.tools)


def prompt_in(row: RowReader) -> Prompt:
    """What is asked in a row. Turns after the last question are answers. Raises DataError, Missing."""
    turns = list(from_question(_turns_asked(row)))
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise Missing
    return _whole_prompt(row, turns)


def preferred_in(row: RowReader) -> Preferred:
    """The prompt and the two answers in a row: texts, or lists of turns. Raises DataError, Missing."""
    asked = _turns_in(row, "prompt", "user")
    chosen, rejected = (_turns_in(row, role, "assistant") for role in ("chosen", "rejected"))
    common = 0  # turns that both lists repeat before their answers
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    asked = [*asked, *chosen[:common]] if chosen[:common] != asked else asked
    answers = []
    for role, turns in (("chosen", chosen[common:]), ("rejected", rejected[common:])):
        row.role = role
        if len(turns) != 1 or not turns[0].content or turns[0].role != "assistant":
            raise DataError(f"expected one answer of the assistant, found {len(turns)} turns: keep the last one")
        answers.append(turns[0].content)
    return Preferred(_whole_prompt(row, asked).turns, *answers)


def _turns_asked(row: RowReader) -> list[Turn]:
    """All turns of a row that has them in one column, else its prompt, with its input after a blank line."""
    if row.has("messages"):
        return row.require_value(turns_of(row.cell("messages"), row.replaced))
    turns = _turns_in(row, "prompt", "user")
    more = text_of(row.cell("input"), row.replaced)
    return turns if more is None else [*turns[:-1], Turn(turns[-1].role, f"{turns[-1].content}\n\n{more}")]


def _turns_in(row: RowReader, role: str, speaker: str) -> list[Turn]:
    """A cell with a text, or with turns. Raises Missing."""
    cell = row.cell(role)
    if isinstance(cell, (list, tuple)):
        return row.require_value(turns_of(cell, row.replaced))
    return [Turn(speaker, row.text(role))]


def _whole_prompt(row: RowReader, turns: Sequence[Turn]) -> Prompt:
    """The turns with the system turn and the tools from columns of their own."""
    prompt = prompt_of(turns, None, text_of(row.cell("system"), row.replaced))
    return replace(prompt, tools=tools_of(row.cell("tools")))


def from_question(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns without answers that stand before the first question."""
    lead = next((place for place, turn in enumerate(turns) if turn.role != "system"), len(turns))
    start = next((place for place, turn in enumerate(turns) if turn.role == "user"), len(turns))
    return turns if start <= lead else [*turns[:lead], *turns[start:]]


def prompt_of(turns: Sequence[Turn], tools: CellValue, system: str | None) -> Prompt:
    """All turns, with the system turn from a column of its own in front. Raises DataError."""
    first = [] if system is None else [Turn("system", system)]
    if first and turns and turns[0].role == "system":
        raise DataError("a system turn in the conversation and one in a column of its own: keep one of them")
    return Prompt((*first, *turns), tools_of(tools))


def _answers(turn: Turn) -> bool:
    return turn.role == "assistant" and bool(turn.content.strip() or turn.tool_calls)


def turns_of(cell: CellValue, replaced: Counter[str] | None = None) -> list[Turn] | None:
    """The turns in a cell: a list, or a text that is a JSON list; None if the cell is missing. Raises DataError."""
    if isinstance(cell, str) and cell.strip():
        cell = json_in(cell, "is not JSON: expected a conversation")
    if is_missing(cell):
        return None
    if not isinstance(cell, (list, tuple)):
        raise DataError(
            f"expected a list of turns such as [{{'role': 'user', 'content': 'Hi'}}], found {type(cell).__name__}"
        )
    if len(cell) > MOST_TURNS:
        raise DataError(f"a conversation of {len(cell)} turns, the limit is {MOST_TURNS}: divide it")
    turns = []
    for number, each in enumerate(cell, 1):
        try:
            turns.append(_turn(each, replaced))
        except DataError as error:
            raise DataError(f"turn {number}: {error}") from None
    return turns or None


def _turn(value: CellValue, replaced: Counter[str] | None = None) -> Turn:
    if not isinstance(value, Mapping):
        raise DataError(f"expected an object with role and content, found {type(value).__name__}")
    said = value.get("role", value.get("from"))
    role = _ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        known = "system, user, assistant and tool (or human, gpt, function_call and observation)"
        raise DataError(f"the role is {quote(str(said), 40)}: expected {known}")
    content = _content(value.get("content", value.get("value")), replaced)
    calls = value.get("tool_calls") or None
    if isinstance(said, str) and said.strip().lower() in _CALLS:
        calls, content = json_in(content, "is not JSON: expected a call of a tool"), ""
    if calls is not None and role != "assistant":
        raise DataError(f"a turn of the role {role} has tool calls: only the assistant calls tools")
    name, call = (text_of(str(value.get(key) or ""), replaced) or "" for key in ("name", "tool_call_id"))
    written = "" if calls is None else _calls(calls, replaced)
    return Turn(role, content, written, name if role == "tool" else "", call if role == "tool" else "")


def _content(cell: CellValue, replaced: Counter[str] | None = None) -> str:
    """The text of a turn; "" if it has none, as a turn with tool calls."""
    if isinstance(cell, (list, tuple)):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in cell]
        if not all(isinstance(part, str) for part in parts):
            raise DataError("a part of the content is no text: only texts can be learnt; leave the row out")
        cell = "".join(str(part) for part in parts)
    return text_of(cell, replaced) or ""


def _calls(value: CellValue, replaced: Counter[str] | None = None) -> str:
    """The calls of a turn as JSON, in the form that chat templates expect: with the arguments as an object."""
    calls = [_call(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
    return text_of(json.dumps(calls, ensure_ascii=False), replaced) or "" if calls else ""


def _function(value: CellValue, wrong: str) -> JsonMapping:
    """The function in a tool or a call. Raises DataError if it has no name."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(wrong)
    return function


def _call(value: CellValue) -> JsonObject:
    function = _function(value, 'a tool call needs a name, as in {"name": "search", "arguments": {"text": "cats"}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # a model may have written arguments that are not JSON
            arguments = json.loads(arguments)
    call: JsonObject = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return {"id": value["id"], **call} if isinstance(value, Mapping) and value.get("id") else call


def tools_of(cell: CellValue) -> str:
    """The tools in a cell as JSON, each as `{"type": "function", "function": {...}}`; "" if there are none."""
    if is_missing(cell):
        return ""
    if isinstance(cell, str):
        cell = json_in(cell, "is not JSON: expected the list of tools")
    wrapped = []
    for tool in cell if isinstance(cell, (list, tuple)) else [cell]:
        function = _function(
            tool, 'a tool needs a name, as in [{"name": "search", "description": "...", "parameters": {}}]'
        )
        first = {key: function[key] for key in ("name", "description", "parameters") if key in function}
        wrapped.append({"type": "function", "function": first | dict(function)})  # in one order, for equal tokens
    return text_of(json.dumps(wrapped, ensure_ascii=False)) or "" if wrapped else ""
