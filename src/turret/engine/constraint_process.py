"""Compiles a constraint in a process of its own before the engine compiles it.

llguidance recurses on its thread's stack: a constraint that is built for it ends the whole process, and no thread can
catch that. So a helper process with less time, memory and stack compiles every constraint first, and the engine
compiles only what the helper survived. A helper that died is replaced for the next constraint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypedDict, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from turret.errors import one_line
from turret.process import Died, HelperProcess

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
    return LLTokenizer(text, n_vocab=size, eos_token=list(eos))


def matcher_of(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    """A grammar of llguidance's format, compiled. Its `is_error` may be true."""
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


@dataclass(frozen=True)
class Refusal:
    """Why the engine must not compile a constraint. late: the helper ran out of time, perhaps on a busy machine."""

    why: str
    late: bool = False


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


class ConstraintProcess:
    """The helper process of one tokenizer. It starts with the first constraint. Any thread may call its methods.

    Args:
        text, size, eos: As of `tokenizer_of`.
        seconds: For one constraint.
    """

    def __init__(self, text: str, size: int, eos: Sequence[int], seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self.helper = HelperProcess[GrammarQuestion, GrammarReply](
            __name__,
            {"tokenizer": text, "size": size, "eos": list(eos)},
            seconds,
            HELPER_MEMORY,
            "a constraint cannot be compiled",
        )

    def check(self, grammar: str) -> Refusal | None:
        """Compile a grammar in the helper. Returns why the engine must not compile it; None if it may.

        Raises:
            EngineError: The helper cannot be started, or was killed twice.
        """
        answer = self.helper.ask({"grammar": grammar})
        if not isinstance(answer, Died):
            return None if answer["error"] is None else Refusal(str(answer["error"]))
        if answer.late:
            return Refusal(f"compiling it takes more than {self._seconds:g} seconds: make it smaller", late=True)
        most = HELPER_MEMORY >> 20
        return Refusal(f"compiling it takes more stack, or more than {most} MiB: nest it less deeply")

    def close(self) -> None:
        """End the helper."""
        self.helper.close()


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
