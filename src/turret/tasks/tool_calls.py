"""Calls of tools in the text of an answer: how a template writes one, and how they are read back.

Templates differ in what they put around a call: `<tool_call>`, a list, nothing. All write a JSON object with the name
of the tool and its arguments, so calls are found by that object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from turret.json_types import Plain

MOST_CALLS = 128  # of one answer
ARGUMENTS = ("arguments", "parameters")


class Call(NamedTuple):
    """A call of a tool. arguments: JSON."""

    name: str
    arguments: str


class Answer(NamedTuple):
    """An answer with its calls apart."""

    content: str  # before the first call
    calls: list[Call]


@dataclass(frozen=True)
class CallFormat:
    """What a template writes before and after the JSON of a call, and its key for the arguments."""

    before: str = ""
    after: str = ""
    key: Literal["arguments", "parameters"] = "arguments"

    @classmethod
    def of_text(cls, text: str, name: str) -> Self:
        """The format of a text with one call of a tool of that name; the usual one if it has no such JSON."""
        for start, end, value in json_objects(text):
            if value.get("name") == name:
                before, after = text[:start], text[end:].rstrip()
                close = before.rstrip()[-1:] == "[" and after.lstrip()[:1] == "]"
                after = after[: after.index("]") + 1] if close else _up_to_special(after)
                return cls(before, after, "parameters" if "parameters" in value else "arguments")
        return cls()

    @property
    def opening(self) -> str:
        """What shows in an answer's text that a call begins."""
        return self.before.strip()


def _up_to_special(text: str) -> str:
    """The closing tag of a call, without what ends the answer: `</tool_call>` of `</tool_call><|im_end|>`."""
    tag, close, _ = text.partition(">")
    return tag + close if tag.lstrip().startswith("</") else ""


def json_objects(text: str) -> list[tuple[int, int, Mapping[str, Plain]]]:
    """The outermost JSON objects in a text whose numbers are finite: start, end, value."""
    decoder = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
    place, found = 0, list[tuple[int, int, Mapping[str, Plain]]]()
    while len(found) < MOST_CALLS and (place := text.find("{", place)) >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        found.append((place, end, value))
        place = end
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def read_calls(text: str, names: Collection[str], form: CallFormat) -> Answer:
    """The calls of known tools in an answer, and the text before the first one."""
    calls, first = list[Call](), len(text)
    for start, _, value in json_objects(text):
        if (call := _call(value, names)) is not None:
            calls.append(call)
            first = min(first, start)
    content = text[:first]
    if calls:
        bare = content.rstrip()
        for mark in (form.opening, form.opening.removesuffix("["), "["):
            if mark and bare.endswith(mark):
                content = bare.removesuffix(mark)
                break
    return Answer(content, calls)


def _call(value: Mapping[str, Plain], names: Collection[str]) -> Call | None:
    key = next((key for key in ARGUMENTS if key in value), None)
    name = value.get("name")
    if not isinstance(name, str) or name not in names or key is None:
        return None
    given = value[key]
    return Call(name, given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))


def may_begin(text: str, form: CallFormat) -> int:
    """Where a call may begin in a text, at the earliest; the length of the text if nowhere."""
    marks = {"{", "[", form.opening[:1]} - {""}
    return min((at for at in map(text.find, marks) if at >= 0), default=len(text))
