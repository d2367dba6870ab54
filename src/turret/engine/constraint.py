"""What an answer must look like: a JSON schema, a regular expression, one of several texts, or a grammar.

A constraint is a text; `structured_output` compiles it and follows it. Compiling recurses, so how deep a schema or a
grammar is nested, also through its references, is checked first. Loads no torch.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, TypedDict, TypeVar
from urllib.parse import unquote

from turret.errors import DataError, one_line
from turret.json_types import Plain
from turret.process import Died, HelperProcess

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_BYTES = 64 << 10  # of a schema, an expression, a grammar, or all choices together
MOST_CHOICES = 1024
MOST_DEPTH = 512  # of a schema's objects and lists, and of a grammar's rules and brackets, along their references
WHITE_SPACE = r"[\x20\x0A]{1,20}"  # between the parts of JSON; unbounded, a model may write nothing else


@dataclass(frozen=True)
class Constraint:
    """A grammar in llguidance's own format. Make it with one of the class methods; each raises DataError."""

    grammar: str
    what: str  # it is, for messages

    @classmethod
    def json_schema(cls, schema: Mapping[str, Plain] | bool, what: str = "the JSON schema") -> Constraint:
        """JSON that the schema accepts. Keywords that cannot be enforced are refused when it is compiled."""
        from llguidance import LLMatcher

        _check_schema_depth(schema, what)
        text = _check_size(json.dumps(schema), what)
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

        return cls(
            LLMatcher.grammar_from_regex(_check_size(pattern, "the regular expression")), "the regular expression"
        )

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """One of several texts."""
        if not 1 <= len(choices) <= MOST_CHOICES or not all(choices):
            raise DataError(f"choices: expected 1 to {MOST_CHOICES} texts, none of them empty")
        return cls.lark("start: " + " | ".join(map(lark_string, choices)), "the choices")

    @classmethod
    def json_between(
        cls, before: Sequence[str | int], schema: Mapping[str, Plain], after: Sequence[str | int], what: str
    ) -> Constraint:
        """JSON that a schema accepts, between fixed parts. before, after: texts, and ids of special tokens."""
        _check_schema_depth(schema, what)
        options = {"x-guidance": {"lenient": False, "whitespace_pattern": WHITE_SPACE}}
        parts = [*map(_lark_term, before), "found", *map(_lark_term, after)]
        return cls.lark(f"start: {' '.join(parts)}\nfound: %json {json.dumps({**schema, **options})}", what)

    @classmethod
    def lark(cls, grammar: str, what: str = "the grammar") -> Constraint:
        """A text of a grammar in llguidance's variant of Lark."""
        from llguidance import LLMatcher

        _check_grammar_depth(_check_size(grammar, what), what)
        return cls(LLMatcher.grammar_from_lark(grammar), what)


def lark_string(text: str) -> str:
    """A text as a string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _lark_term(part: str | int) -> str:
    return lark_string(part) if isinstance(part, str) else f"<[{part}]>"


def _check_size(text: str, what: str) -> str:
    size = len(text.encode("utf-8", "replace"))
    if not text or size > MOST_BYTES:
        raise DataError(f"{what} has {size} bytes: expected 1 to {MOST_BYTES}")
    return text


# --- how deep it is nested --------------------------------------------------------------------------------------------


def _check_schema_depth(schema: Mapping[str, Plain] | bool, what: str) -> None:
    """Raise DataError for a schema that is nested too deeply. A reference counts as if its target stood in its place.

    A target is followed where it is first referred to, as a compiler does; so a schema may refer to itself.
    """
    seen: set[str] = set()
    waiting: list[tuple[Plain, int]] = [(dict(schema) if isinstance(schema, Mapping) else schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MOST_DEPTH:
            raise _too_deep(what, "objects and lists, its references included,")
        if isinstance(value, dict):
            reference = value.get("$ref")
            if isinstance(reference, str) and reference not in seen:
                seen.add(reference)
                waiting.append((_target(schema, reference), depth + 1))
            waiting += [(each, depth + 1) for key, each in value.items() if key not in _DEFINITIONS]
        elif isinstance(value, list):
            waiting += [(each, depth + 1) for each in value]


_DEFINITIONS = ("$defs", "definitions")  # they count where something refers to them


def _target(schema: Mapping[str, Plain] | bool, reference: str) -> Plain:
    """What a `$ref` within a schema refers to, by its path; None if it refers to nothing, or by another name."""
    value: Plain = dict(schema) if isinstance(schema, Mapping) else schema
    for part in reference.partition("#")[2].split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isascii() and key.isdigit() and len(key) < 7:
            value = value[int(key)] if int(key) < len(value) else None
        else:
            return None
    return value


_STRING = r'"(?:[^"\\\n]|\\.)*+"'
_REGEX = r"/(?![/*])(?:[^/\\\n]|\\.)*+/[imslux]*"
_COMMENT = r"(?://|\#)[^\n]*"
_TOKEN = re.compile(rf"{_STRING}|{_REGEX}|{_COMMENT}|%json\b|(?P<word>[A-Za-z_]\w*)|[()\[\]{{}}]|(?P<colon>:)")


def _check_grammar_depth(grammar: str, what: str) -> None:
    """Raise DataError for a Lark grammar with brackets, schemas or a chain of rules that are nested too deeply."""
    rules: dict[str, tuple[int, list[str]]] = {}
    for name, text in _rules(grammar):
        depth = deepest = 0
        words: list[str] = []
        for found in _TOKEN.finditer(text):
            if found["word"]:
                words.append(found["word"])
            elif found[0] in ("(", "[", "{"):
                depth += 1
                deepest = max(deepest, depth)
            elif found[0] in (")", "]", "}"):
                depth = max(0, depth - 1)
        rules[name] = deepest + 1, words
    entered: set[str] = set()
    for first in ("start", *rules):
        waiting = [(first, 0)]
        while waiting:
            name, above = waiting.pop()
            if name in entered or name not in rules:
                continue
            entered.add(name)
            deepest, words = rules[name]
            if above + deepest > MOST_DEPTH:
                raise _too_deep(what, "brackets and rules that refer to rules")
            waiting += [(word, above + deepest) for word in words]


def _rules(grammar: str) -> Iterator[tuple[str, str]]:
    """The rules and terminals of a Lark grammar: their names, and what follows them."""
    starts = list(re.finditer(r"^[ \t]*[?!]?([A-Za-z_]\w*)[^:\n\"/]*:", grammar, re.MULTILINE))
    for found, following in zip_longest(starts, starts[1:]):
        yield found[1], grammar[found.end() : len(grammar) if following is None else following.start()]


def _too_deep(what: str, nested: str) -> DataError:
    return DataError(f"{what} has {nested} nested more than {MOST_DEPTH} deep: nest it less deeply")


# --- compiled in a helper process -------------------------------------------------------------------------------------
# llguidance recurses on its thread's stack: a constraint that is built for it ends the whole process, and no thread can
# catch that. So a helper process with less time, memory and stack compiles every constraint first, and the engine
# compiles only what the helper survived. A helper that died is replaced for the next constraint.


T = TypeVar("T")

# Of llguidance: a lexer state takes 1 to 2 kB, and fuel is spent at 14 to 50 units a microsecond.
LEXER_STATES = 30_000
GRAMMAR_SIZE = 100_000
COMPILE_FUEL = 1_000_000
STEP_FUEL = 200_000
STEP_ITEMS = 20_000

STACK = 16 << 20  # bytes of the thread that compiles in the engine's process
HELPER_STACK = STACK // 2
HELPER_MEMORY = 1 << 30  # bytes that the helper may allocate for one constraint
SECONDS = 5.0  # for one constraint
REHEARSED = 8  # tokens of an answer that the helper takes


def tokenizer_of(text: str, size: int, eos: Sequence[int]) -> LLTokenizer:
    """A fast tokenizer, as the text of its `tokenizer.json`, as llguidance reads it. size: of the vocabulary."""
    from llguidance import LLTokenizer

    return LLTokenizer(text, n_vocab=size, eos_token=list(eos))


def matcher_of(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    """A grammar of llguidance's format, compiled. Its `is_error` may be true."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=COMPILE_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=LEXER_STATES,
        max_grammar_size=GRAMMAR_SIZE,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )
    return LLMatcher(tokens, grammar, log_level=0, limits=limits)


def with_stack(size: int, function: Callable[[], T]) -> T:
    """Call a function on a thread with a stack of so many bytes, and wait for it."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    with _starting:
        before = threading.stack_size(size)
        try:
            thread = threading.Thread(target=run, name="turret-compile", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return result.result()


_starting = threading.Lock()  # the size is one setting of the whole process


class AboutTokens(TypedDict):
    """As of `tokenizer_of`."""

    tokenizer: str
    size: int
    eos: list[int]


class GrammarQuestion(TypedDict):
    """A grammar to compile."""

    grammar: str


class GrammarReply(TypedDict):
    """The error of llguidance."""

    error: str | None


Helper = HelperProcess[GrammarQuestion, GrammarReply]


def helper_process(text: str, size: int, eos: Sequence[int], seconds: float = SECONDS) -> Helper:
    """The helper process of one tokenizer.

    Args:
        text, size, eos: As of `tokenizer_of`.
        seconds: For one constraint.
    """
    return Helper(
        __name__,
        {"tokenizer": text, "size": size, "eos": list(eos)},
        seconds,
        HELPER_MEMORY,
        "a constraint cannot be compiled",
    )


def refusal(answer: GrammarReply | Died) -> str | None:
    """Why the engine must not compile a constraint, by the helper's answer; None if it may."""
    if not isinstance(answer, Died):
        return answer["error"]
    if answer.late:
        return f"compiling it takes more than {SECONDS:g} seconds: make it smaller"
    return f"compiling it takes more stack, or more than {HELPER_MEMORY >> 20} MiB: nest it less deeply"


# --- in the helper ----------------------------------------------------------------------------------------------------


def helper(about: AboutTokens) -> Callable[[GrammarQuestion], GrammarReply]:
    """What compiles a grammar, for `turret.process`."""
    tokens = tokenizer_of(about["tokenizer"], about["size"], about["eos"])
    return lambda asked: {"error": with_stack(HELPER_STACK, partial(_rehearse, tokens, asked["grammar"]))}


def _rehearse(tokens: LLTokenizer, grammar: str) -> str | None:
    """Compile a grammar, and take the first tokens that it allows. Returns llguidance's error."""
    matcher = matcher_of(tokens, grammar)
    for _ in range(REHEARSED):
        if matcher.is_error() or matcher.is_stopped():
            break
        bits = matcher.compute_bitmask()
        place = next((place for place, byte in enumerate(bits) if byte), None)
        if place is None or not matcher.consume_token(8 * place + (bits[place] & -bits[place]).bit_length() - 1):
            return None  # only the end of the text may follow
    return one_line(matcher.get_error(), 600) if matcher.is_error() else None
