"""The shapes that tasks give and take as JSON: what is stored of a task, its answers, its metrics.

Each task has some of the keys. All other keys of a stored task belong to a newer version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, TypedDict


class CalibrationSpec(TypedDict):
    """A `Calibration` as it is stored."""

    temperature: float
    examples: int
    scores: list[float]
    chose_weights: bool


class SurenessSpec(TypedDict):
    """A `Sureness` as it is stored: the fields of `Bin` and `Decided`, in their order."""

    bins: list[list[float]]
    curve: list[list[float]]


class Generation(TypedDict, total=False):
    """The arguments of transformers' `generate()`; empty for a task whose head answers."""

    max_new_tokens: int
    num_beams: int
    do_sample: bool
    eos_token_id: int
    pad_token_id: int
    min_new_tokens: int


class TaskSpec(TypedDict, total=False):
    """A task as it is stored with its adapter: everything that answering needs. Empty for an adapter of PEFT."""

    kind: str
    max_tokens: int
    prefix_text: str
    # of a task with a head
    labels: list[str]
    multi_label: bool
    class_weights: Mapping[str, float] | None
    calibration: CalibrationSpec | dict[str, CalibrationSpec]  # of several questions: one for each
    pairs: bool
    # of numbers
    mean: float
    deviation: float
    low: float
    high: float
    highest: float
    # of vectors
    loss: Literal["multiple_negatives", "cosent", "triplet"]
    pooling: Literal["mean", "first", "last"]
    normalize: bool | None
    dimensions: list[int] | None
    # of generated texts
    family_kind: Literal["encoder-decoder", "decoder"]
    max_target_tokens: int
    chat_template: bool
    template: str
    template_digest: str
    loss_on: Literal["assistant", "last"]
    generation: Generation
    # of preferences
    objective: Literal["dpo", "orpo"]
    beta: float
    reference: str


class HeadConfig(TypedDict, total=False):
    """The head's keys in transformers' configuration of a model."""

    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str


class LabelAnswer(TypedDict):
    """The answer to one of several questions."""

    label: str
    probabilities: dict[str, float]


class SpanAnswer(TypedDict):
    """A part of a text that has a label. start, end: its characters."""

    label: str
    start: int
    end: int
    text: str
    probability: float


class TopToken(TypedDict):
    """A token that could stand at a place of a text."""

    token: str
    id: int
    logprob: float


class TokenReport(TypedDict):
    """A token of a text, with the most probable ones at its place. The first token of a prompt has no logprob."""

    token: str
    id: int
    logprob: float | None
    top: list[TopToken] | None


class Answer(TypedDict, total=False):
    """An answer to one input. Each task gives some of the keys."""

    label: str | list[str]
    probabilities: dict[str, float]  # of every label
    answers: dict[str, LabelAnswer]  # by question
    spans: list[SpanAnswer]
    value: float
    embedding: list[float]
    nearest: str  # the nearest text to an anchor
    place: int  # of the right text, among those that are near
    margin: float  # how much more likely the chosen answer is
    text: str
    finish_reason: str | None
    # what the engine and those who ask it add
    tokens: int  # that were generated
    prompt_tokens: int
    logprobs: list[TokenReport] | list[float]  # the numbers alone, of tokens that were given to be scored
    logits: list[float] | list[list[float]]
    label_set: list[str]
    abstain: bool


def reports_in(answer: Answer) -> list[TokenReport]:
    """The tokens of an answer's text, with the most probable ones at their places."""
    return [each for each in answer["logprobs"] if isinstance(each, dict)]


MetricParts: TypeAlias = Mapping[str, Mapping[str, float]]  # by class or question, the numbers of each
MetricValue: TypeAlias = "float | Mapping[str, Mapping[str, float] | str] | None"  # None: not a finite number
Metrics: TypeAlias = Mapping[str, MetricValue]  # by name; `per_class` and `per_question` have parts
SplitMetrics: TypeAlias = Mapping[str, Metrics]  # by split: of a version


def number_in(metrics: Metrics, name: str) -> float | None:
    """A metric that is one number; None if it was not measured."""
    value = metrics.get(name)
    return value if isinstance(value, int | float) else None


def number_of(metrics: Metrics, name: str) -> float:
    """A metric that is one number. Raises KeyError if it was not measured."""
    value = metrics[name]
    if not isinstance(value, int | float):
        raise KeyError(name)
    return value


def numbers_in(metrics: Metrics) -> dict[str, float]:
    """The metrics that are one number each."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def parts_in(metrics: Metrics, name: str) -> MetricParts:
    """A metric that has parts; empty if it was not measured."""
    value = metrics.get(name)
    parts = value if isinstance(value, Mapping) else {}
    return {part: each for part, each in parts.items() if isinstance(each, Mapping)}
