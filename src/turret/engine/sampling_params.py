"""How a text is answered: the options of one request. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from turret.engine.constraint import Constraint
from turret.errors import DataError
from turret.tasks.calibration import check_coverage
from turret.tasks.task import Embedding

STOPS = 16  # most stop strings of one request
STOP_CHARACTERS = 256  # most characters of one stop string
BEAMS = 16  # most beams of one request
TOP = 20  # most alternatives reported with a token
BIASES = 1024  # most tokens with a bias of their own


@dataclass(frozen=True)
class SamplingParams:
    """How a text is answered. None takes the adapter's own setting, else the base's, else greedy and `MAX_TOKENS`.

    `coverage` and `logits` are for a text that is classified: the answer gets a `label_set` with this coverage, or is
    the outputs of the head. All else is for a text that is generated. A temperature above 0 samples. top_p or top_k
    without a temperature sample at temperature 1. logprobs is the number of most probable tokens to report with each
    token of the answer; 0 reports only the token's own probability.

    Attributes:
        presence_penalty, frequency_penalty: Subtracted from the score of a token of the answer so far: once, and once
            for each time it occurs.
        logit_bias: Added to the score of a token, by id.
        constraint: What the answer must look like; other tokens are never chosen.
        strip: Whether white space around the answer is removed.
        echo: Whether the text, and its logprobs, begin with those of the prompt.
        scored: Answers to a prompt of token ids, as token ids each. Nothing is generated: `logprobs` has the logarithm
            of each answer's probability.
        cut: Whether a prompt that the adapter finds too long is cut as in training. Otherwise it is an error.
        truncate_prompt_tokens: The most tokens of a prompt, of which the last are kept; -1: as many as there is room.
            An adapter that cuts prompts itself keeps its own template whole.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_beams: int | None = None
    logprobs: int | None = None
    coverage: float | None = None  # of a text that is classified
    logits: bool = False  # of a text that is classified: answer with `logits` (K, C), instead of a label
    read: tuple[int, ...] | None = None  # of a row of token ids: the places that a head for tokens reads
    embedding: Embedding | None = None  # of a text that is embedded
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None
    strip: bool = True
    echo: bool = False
    scored: tuple[tuple[int, ...], ...] | None = None
    cut: bool = True
    truncate_prompt_tokens: int | None = None
    min_tokens: int | None = None  # before which the answer does not end

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _texts(self.stop))  # as frozen dataclasses set a field
        _between("max_tokens", self.max_tokens, 0 if self.echo else 1, 1 << 31, whole=True)
        _between("min_tokens", self.min_tokens, 0, 1 << 31, whole=True)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _between("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, 1 << 31, whole=True)
        if len(self.logit_bias) > BIASES:
            raise DataError(f"logit_bias of {len(self.logit_bias)} tokens: expected at most {BIASES}")
        for token, bias in self.logit_bias:
            _between(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if self.constraint is not None and (self.num_beams or 1) > 1:
            raise DataError("num_beams searches and a constraint masks tokens: give one of them")
        if self.echo and (self.num_beams or 1) > 1:
            raise DataError("echo does not work with num_beams: leave out one of them")
        if self.scored is not None and (self.echo or self.max_tokens is not None or self.num_beams is not None):
            raise DataError("scored generates nothing: leave out echo, max_tokens and num_beams")
        if self.scored is not None and not (self.scored and all(self.scored)):
            raise DataError("scored: expected one or more answers, of one token id or more each")
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_p", self.top_p, 0.0, 1.0, above=True)
        _between("top_k", self.top_k, 1, 1 << 31, whole=True)
        _between("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _between("seed", self.seed, -(1 << 63), 1 << 64, whole=True)
        _between("num_beams", self.num_beams, 1, BEAMS, whole=True)
        _between("logprobs", self.logprobs, 0, TOP, whole=True)
        if self.coverage is not None:
            check_coverage(self.coverage)
        if len(self.stop) > STOPS or not all(isinstance(s, str) and 0 < len(s) <= STOP_CHARACTERS for s in self.stop):
            raise DataError(f"stop: expected at most {STOPS} texts of 1 to {STOP_CHARACTERS} characters each")
        if self.samples and (self.num_beams or 1) > 1:
            raise DataError("num_beams searches and temperature samples: give one of them")

    @property
    def samples(self) -> bool:
        return self.effective_temperature > 0.0

    @property
    def effective_temperature(self) -> float:
        """The temperature that applies; 0 is greedy."""
        if self.temperature is not None:
            return self.temperature
        return 1.0 if self.top_k is not None or (self.top_p is not None and self.top_p < 1.0) else 0.0


def _texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _between(
    name: str, value: float | None, low: float, high: float, *, whole: bool = False, above: bool = False
) -> None:
    if value is None:
        return
    number = isinstance(value, int) if whole else isinstance(value, int | float) and math.isfinite(value)
    if isinstance(value, bool) or not number or not (low < value if above else low <= value) or value > high:
        kind = "a whole number" if whole else "a number"
        raise DataError(f"{name} = {value!r}: expected {kind} {'above' if above else 'from'} {low:g} to {high:g}")
