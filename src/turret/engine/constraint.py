"""What an answer must look like: a JSON schema, a regular expression, one of several texts, or a grammar.

A constraint is a text; `guide` compiles it and follows it. Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from turret.errors import DataError, one_line
from turret.json_types import JsonMapping

MOST_BYTES = 64 << 10  # of a schema, an expression, a grammar, or all choices together
MOST_CHOICES = 1024
WHITE_SPACE = r"[\x20\x0A]{1,20}"  # between the parts of JSON; unbounded, a model may write nothing else


@dataclass(frozen=True)
class Constraint:
    """A grammar in llguidance's own format. Make it with one of the class methods; each raises DataError."""

    grammar: str
    what: str  # it is, for messages

    @classmethod
    def json_schema(cls, schema: JsonMapping | bool, what: str = "the JSON schema") -> Constraint:
        """JSON that the schema accepts. Keywords that cannot be enforced are refused when it is compiled."""
        from llguidance import LLMatcher

        text = _bounded(json.dumps(schema), what)
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                text, overrides={"lenient": False, "whitespace_pattern": WHITE_SPACE}
            )
            return cls(grammar, what)
        except ValueError as error:
            raise DataError(f"{what} cannot be used: {one_line(str(error), 200)}") from None

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, "a JSON object")

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """A text that the whole expression matches. The syntax is that of Rust's `regex`, without look-around."""
        from llguidance import LLMatcher

        return cls(LLMatcher.grammar_from_regex(_bounded(pattern, "the regular expression")), "the regular expression")

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """One of several texts."""
        if not 1 <= len(choices) <= MOST_CHOICES or not all(choices):
            raise DataError(f"choices: expected 1 to {MOST_CHOICES} texts, none of them empty")
        return cls.lark("start: " + " | ".join(map(quoted, choices)), "the choices")

    @classmethod
    def json_between(
        cls, before: Sequence[str | int], schema: JsonMapping, after: Sequence[str | int], what: str
    ) -> Constraint:
        """JSON that a schema accepts, between fixed parts. before, after: texts, and ids of special tokens."""
        options = {"x-guidance": {"lenient": False, "whitespace_pattern": WHITE_SPACE}}
        parts = [*map(_fixed, before), "found", *map(_fixed, after)]
        return cls.lark(f"start: {' '.join(parts)}\nfound: %json {json.dumps({**schema, **options})}", what)

    @classmethod
    def lark(cls, grammar: str, what: str = "the grammar") -> Constraint:
        """A text of a grammar in llguidance's variant of Lark."""
        from llguidance import LLMatcher

        return cls(LLMatcher.grammar_from_lark(_bounded(grammar, what)), what)


def quoted(text: str) -> str:
    """A text as a string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _fixed(part: str | int) -> str:
    return quoted(part) if isinstance(part, str) else f"<[{part}]>"


def _bounded(text: str, what: str) -> str:
    size = len(text.encode("utf-8", "replace"))
    if not text or size > MOST_BYTES:
        raise DataError(f"{what} has {size} bytes: expected 1 to {MOST_BYTES}")
    return text
