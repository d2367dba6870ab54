"""Which tokens may follow in a constrained answer, by llguidance.

A constrained row masks its own scores; it is a row of the mixed pass like any other. Compiling is bounded by the size
of the constraint and by llguidance's limits, and releases Python's global lock.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from turret.engine.constraint import Constraint
from turret.errors import DataError, one_line
from turret.transformer import Tokenizer

COMPILED = 64  # constraints that stay compiled
# Of llguidance: a lexer state takes 1 to 2 kB, and fuel is spent at 14 to 50 units a microsecond.
LEXER_STATES = 30_000
GRAMMAR_SIZE = 100_000
COMPILE_FUEL = 1_000_000
STEP_FUEL = 200_000
STEP_ITEMS = 20_000


class Constraints:
    """Compiles constraints for one tokenizer, and keeps the last ones.

    Args:
        vocabulary: Tokens that the model has scores for.
        eos: Tokens that end an answer of the base.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos)
        self._lock = threading.Lock()
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._own: LLTokenizer | None = None

    def compiled(self, constraint: Constraint) -> LLMatcher:
        """A matcher at its start, for one answer. May take a second; runs on the caller's thread. Raises DataError."""
        with self._lock:
            known = self._known.get(constraint.grammar)
            if known is not None:
                self._known.move_to_end(constraint.grammar)
            tokens = self._tokens()
        if known is None:
            known = _compile(tokens, constraint)
            with self._lock:
                self._known[constraint.grammar] = known
                while len(self._known) > COMPILED:
                    self._known.popitem(last=False)
        return known.deep_copy()

    def _tokens(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it. Called with the lock."""
        if self._own is None:
            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None or not self._eos:
                raise DataError("structured answers need a base with a fast tokenizer and an end-of-text token")
            size = max(self._vocabulary, backend.get_vocab_size())
            try:
                self._own = LLTokenizer(backend.to_str(), n_vocab=size, eos_token=self._eos)
            except Exception as error:  # Rust's, of any type
                reason = one_line(str(error), 160)
                raise DataError(f"structured answers do not work with the tokenizer of this base: {reason}") from None
        return self._own

    @property
    def eos(self) -> Sequence[int]:
        """The tokens that end an answer of the base."""
        return self._eos


def _compile(tokens: LLTokenizer, constraint: Constraint) -> LLMatcher:
    limits = LLParserLimits(
        initial_lexer_fuel=COMPILE_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=LEXER_STATES,
        max_grammar_size=GRAMMAR_SIZE,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokens, constraint.grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise DataError(f"{constraint.what} cannot be used: {_reason(matcher.get_error())}")
    return matcher


def _reason(error: str) -> str:
    """llguidance's error as one line. Unsupported keywords of a schema are named."""
    keys = re.search(r"Unimplemented keys: (\[.*?\])", error)
    return f"unsupported keywords {keys[1]}: leave them out" if keys else one_line(error, 200)


class Guide:
    """The constraint of one row, at the token that it has reached.

    Args:
        matcher: At its start.
        base_eos: Tokens that llguidance takes for an end of text.
        eos: Tokens that end this answer.
    """

    def __init__(self, matcher: LLMatcher, base_eos: Sequence[int], eos: Sequence[int]) -> None:
        self._matcher, self._eos = matcher, list(eos)
        self._other_eos = [token for token in base_eos if token not in self._eos]
        self._denied = np.zeros(0, dtype=np.bool_)  # (V,) at the last step
        self.ended = False  # nothing but the end of the text may follow

    def mask(self, scores: Tensor) -> None:
        """Give every token that may not follow the score -inf. scores: (V,), changed in place."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        denied = np.unpackbits(~bits, count=len(scores), bitorder="little").view(np.bool_)  # (V,)
        denied[8 * len(bits) :] = True
        denied[self._other_eos] = True
        denied[self._eos] = not self._matcher.is_accepting()
        scores.masked_fill_(torch.from_numpy(denied).to(scores.device), -torch.inf)
        self._denied = denied

    def allowed(self) -> Tensor:
        """The tokens that the last `mask` let through, (n,) int64 on the CPU."""
        return torch.from_numpy(np.flatnonzero(~self._denied))

    def take(self, token: int) -> None:
        """Go on after a token that does not end the text. Raises DataError if it may not follow, or at a limit."""
        if not self._matcher.consume_token(token):
            reason = one_line(self._matcher.get_error(), 160) or "no token of this base may follow"
            raise DataError(f"the answer cannot keep to its constraint: {reason}")
        self.ended = self._matcher.is_stopped()
