"""Which tokens may follow in a constrained answer, by llguidance.

A constrained row masks its own scores; it is a row of the mixed pass like any other. Compiling is bounded by the size
of the constraint and by llguidance's limits, and releases Python's global lock. It happens in a helper process first
(`constraint.helper_process`).
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from turret.engine.constraint import (
    STACK,
    Constraint,
    Helper,
    helper_process,
    matcher_of,
    refusal,
    tokenizer_of,
    with_stack,
)
from turret.errors import DataError, one_line
from turret.ops.core import to_device
from turret.process import Died
from turret.transformer import Tokenizer

COMPILED = 64  # constraints that stay compiled
COMPILED_BYTES = 512 << 10  # of the grammars of all of them; compiled, one may take 150 times its bytes
CHECKED = 4096  # constraints that the helper process need not compile again
LATE_SECONDS = 60.0  # for which one that took too long is not tried again


class Constraints:
    """Compiles constraints for one tokenizer, and keeps the last ones.

    Args:
        vocabulary: Tokens that the model has scores for.
        eos: Tokens that end an answer of the base.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self.eos = tokenizer, vocabulary, list(eos)
        self._lock = threading.Lock()
        # by digest: the matcher and the bytes of its grammar; why it is refused and until when that holds
        self._known: OrderedDict[bytes, tuple[LLMatcher, int]] = OrderedDict()
        self._checked: OrderedDict[bytes, tuple[str | None, float]] = OrderedDict()
        self._own: LLTokenizer | None = None
        self._helper: Helper | None = None

    def compile_matcher(self, constraint: Constraint) -> LLMatcher:
        """A matcher at its start, for one answer. May take seconds; runs on the caller's thread. Raises DataError."""
        digest = _digest(constraint)
        with self._lock:
            known = self._known[digest][0] if digest in self._known else None
            if known is not None:
                self._known.move_to_end(digest)
            tokens, helper = self._open_helper()
        if known is None:
            if (refused := self._checked_by(helper, digest, constraint)) is not None:
                raise DataError(f"{constraint.what} cannot be used: {_reason(refused)}")
            known = with_stack(STACK, lambda: matcher_of(tokens, constraint.grammar))
            if known.is_error():
                raise DataError(f"{constraint.what} cannot be used: {_reason(known.get_error())}")
            with self._lock:
                self._known[digest] = known, len(constraint.grammar)
                while len(self._known) > COMPILED or sum(size for _, size in self._known.values()) > COMPILED_BYTES:
                    self._known.popitem(last=False)
        return known.deep_copy()

    def is_compiled(self, constraint: Constraint) -> bool:
        """Whether `compile_matcher` would answer at once."""
        return _digest(constraint) in self._known

    def close(self) -> None:
        """End the helper process."""
        with self._lock:
            if self._helper is not None:
                self._helper.close()

    def _checked_by(self, helper: Helper, digest: bytes, constraint: Constraint) -> str | None:
        """Why the constraint must not be compiled here; None if the helper could compile it, now or before."""
        with self._lock:
            refused, until = self._checked.get(digest, (None, 0.0))
            if time.monotonic() < until:
                self._checked.move_to_end(digest)
                return refused
        answer = helper.ask({"grammar": constraint.grammar})
        refused, late = refusal(answer), isinstance(answer, Died) and answer.late
        with self._lock:
            self._checked[digest] = refused, time.monotonic() + (LATE_SECONDS if late else math.inf)
            while len(self._checked) > CHECKED:
                self._checked.popitem(last=False)
        return refused

    def _open_helper(self) -> tuple[LLTokenizer, Helper]:
        """The tokenizer as llguidance reads it, here and in the helper. Called with the lock."""
        if self._own is None or self._helper is None:
            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None or not self.eos:
                raise DataError("structured answers need a base with a fast tokenizer and an end-of-text token")
            size = max(self._vocabulary, backend.get_vocab_size())
            text = str(backend.to_str())
            try:
                self._own = tokenizer_of(text, size, self.eos)
            except Exception as error:  # Rust's, of any type
                reason = one_line(str(error), 160)
                raise DataError(f"structured answers do not work with the tokenizer of this base: {reason}") from None
            self._helper = helper_process(text, size, self.eos)
        return self._own, self._helper


def _digest(constraint: Constraint) -> bytes:
    return hashlib.sha256(constraint.grammar.encode("utf-8", "surrogatepass")).digest()


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
        scores.masked_fill_(to_device(torch.from_numpy(denied), scores.device), -torch.inf)
        self._denied = denied

    def allowed_tokens(self) -> Tensor:
        """The tokens that the last `mask` let through, (n,) int64 on the CPU."""
        return torch.from_numpy(np.flatnonzero(~self._denied))

    def take(self, token: int) -> None:
        """Go on after a token that does not end the text. Raises DataError if it may not follow, or at a limit."""
        if not self._matcher.consume_token(token):
            reason = one_line(self._matcher.get_error(), 160) or "no token of this base may follow"
            raise DataError(f"the answer cannot keep to its constraint: {reason}")
        self.ended = self._matcher.is_stopped()
