"""Questions that no adapter was trained for: a base answers by the words of the labels, or by what they are similar to.

A decoder reads the text and the question in its chat template. The text is first, so that many questions about it read
it once. The probability of a label is that of its tokens and of the token that ends the answer:

    p(label) = exp(sum_i log p(token_i | prompt, token_1 ... token_{i-1}))

`label_mass` is their sum before they are divided by it. With `prior`, each is first divided by its probability after
the same prompt with an empty text, which takes away what the base prefers whatever the text is.

An encoder compares the vector of a text with those of the labels' descriptions: p = softmax(SCALE cos(text, label)).
`SCALE` is the one that sentence encoders are usually trained with. With `prior` the cosine of an empty text is taken
away.

Source: Zhao et al. 2021, "Calibrate Before Use"; Yin et al. 2019, "Benchmarking Zero-shot Text Classification".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from turret.data import Pair
from turret.engine.request import Ask, Named
from turret.engine.sampling_params import SamplingParams
from turret.errors import BaseModelError, DataError, quote
from turret.json_types import JsonObject
from turret.tasks.chat import bare_chat
from turret.tasks.shapes import Answer
from turret.tasks.task import Encoded, Task
from turret.tasks.tokens import Tokens

if TYPE_CHECKING:
    from turret.bases.base import Base
    from turret.engine.core import Engine

SCALE = 20.0  # of a cosine: 1 / 0.05, as in sentence-transformers' losses and in CLIP before its training
MOST_LABELS = 400
ANSWER_TOKENS = 256  # of a label
EMPTY = ""
FIRST_CHARACTERS = 4096  # of a text that are tried first
TOKEN_CHARACTERS = 16  # a question with more of them for each token that there is room for is refused unread
TOGETHER = 32  # texts that are asked about at a time


@dataclass(frozen=True)
class Question:
    """What is asked of a text.

    Args:
        labels: two or more.
        instructions: what to decide; empty: which label fits.
        descriptions: of labels, by label. An encoder compares texts with them.

    Raises:
        DataError: the labels are no list of different ones, or a description is of none of them.
    """

    labels: Sequence[str]
    instructions: str = ""
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.labels, str) or not 2 <= len(self.labels) <= MOST_LABELS or not all(self.labels):
            raise DataError(f"a question needs 2 to {MOST_LABELS} labels, given {quote(self.labels, 80)}")
        if len(set(self.labels)) < len(self.labels):
            raise DataError(f"the labels of a question must be different, given {quote(list(self.labels), 80)}")
        if unknown := next((each for each in self.descriptions if each not in self.labels), None):
            raise DataError(f"{quote(unknown, 40)} is described and is no label of the question: leave it out")

    def prompt(self, text: str) -> str:
        """The text and the question."""
        lines = [
            f"- {each}: {self.descriptions[each]}" if each in self.descriptions else f"- {each}" for each in self.labels
        ]
        asked = self.instructions or "Which label fits the text?"
        return "\n".join([f"Text: {text}", "", asked, "Answer with one of these labels alone:", *lines])


@dataclass(frozen=True)
class Untrained:
    """The answer of a base to a question that it was not trained for.

    Args:
        probabilities: of each label; their sum is 1.
        label_mass: the probability that a decoder gives to all labels together; None of an encoder.
    """

    probabilities: Mapping[str, float]
    label_mass: float | None
    prompt_tokens: int

    @property
    def label(self) -> str:
        """The most probable one, the first of several."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    def as_json(self) -> JsonObject:
        """As `predict` writes an answer, and marked as untrained."""
        own: JsonObject = {"label": self.label, "probabilities": dict(self.probabilities), "untrained": True}
        return own if self.label_mass is None else own | {"label_mass": self.label_mass}


class ByWords:
    """A decoder. A text that is too long loses its end.

    Args:
        task: of an adapter that generates; None: the base's chat template.
        room: tokens of a prompt and an answer.

    Raises:
        DataError: a label is too long for an answer, or the question without a text is too long for a prompt.
    """

    def __init__(self, base: Base, question: Question, task: Task | None, room: int) -> None:
        self.question = question
        longest = min(ANSWER_TOKENS, room // 4)
        self._task = task or bare_chat(base.tokenizer, room - longest, longest)
        characters = len(question.prompt(EMPTY))
        if characters > TOKEN_CHARACTERS * room or self._encode_text(EMPTY).cut:
            raise DataError(
                f"the question has {characters:,} characters beside the text, more than {base.id} has room for: "
                "give shorter instructions and descriptions, or fewer labels"
            )
        encoded = self._task.encode_examples([Pair(question.prompt(EMPTY), label) for label in question.labels])
        self._targets = tuple(() if target is None else tuple(target.ids.tolist()) for _, target in encoded)
        for label, (_, target) in zip(question.labels, encoded, strict=True):
            if target is None or target.cut:
                raise DataError(f"label {quote(label, 40)} has too many tokens for an answer: give a shorter one")

    def first(self) -> Sequence[Ask]:
        """What is asked once, before any text."""
        return ()

    def about(self, text: str) -> Sequence[Ask]:
        """What is asked of each text."""
        return [Ask("generate", self._prompt(text).ids.tolist(), options=SamplingParams(scored=self._targets))]

    def _prompt(self, text: str) -> Encoded:
        """With as many characters of the text as there is room for, found by doubling and halving.

        So of a very long text only twice the part that fits is ever read.
        """
        known, end = 0, min(len(text), FIRST_CHARACTERS)
        while not (most := self._encode_text(text[:end])).cut:
            if end == len(text):
                return most
            known, end = end, min(len(text), 2 * end)
        while end - known > 1:
            middle = (known + end) // 2
            known, end = (known, middle) if self._encode_text(text[:middle]).cut else (middle, end)
        return self._encode_text(text[:known])

    def _encode_text(self, text: str) -> Encoded:
        return self._task.encode_sources([self.question.prompt(text)])[0]

    def scores(self, first: Sequence[Answer], answers: Sequence[Answer]) -> list[float]:
        """The logarithm of each label's probability."""
        (own,) = answers
        return [each for each in own["logprobs"] if isinstance(each, int | float)]

    def mass(self, scores: Sequence[float]) -> float | None:
        """`label_mass`."""
        return min(1.0, math.fsum(map(math.exp, scores)))


class BySimilarity:
    """An encoder, alone or with an adapter for embeddings.

    Args:
        task: of the adapter; None: the base's own vectors.
        room: tokens of a text, which loses its end if it is longer.
    """

    def __init__(self, base: Base, question: Question, task: Task | None, room: int) -> None:
        self.question, self._task = question, task
        self._tokens, self._room = Tokens(base.tokenizer), room

    def first(self) -> Sequence[Ask]:
        return [self._embed(self.question.descriptions.get(label, label)) for label in self.question.labels]

    def about(self, text: str) -> Sequence[Ask]:
        return [self._embed(text)]

    def _embed(self, text: str) -> Ask:
        if self._task is not None:
            return Ask("embed", self._task.encode_sources([text])[0].ids.tolist())
        return Ask("embed", self._tokens.row(text, self._room))

    def scores(self, first: Sequence[Answer], answers: Sequence[Answer]) -> list[float]:
        """The logarithm of each label's probability, up to a constant."""
        (own,) = answers
        vector = own["embedding"]
        return [SCALE * math.fsum(a * b for a, b in zip(vector, each["embedding"], strict=True)) for each in first]

    def mass(self, scores: Sequence[float]) -> float | None:
        return None


Way = ByWords | BySimilarity  # how a base answers a question: what it is asked, and what the answers mean


def way_of(base: Base, question: Question, task: Task | None = None, *, room: int) -> Way:
    """How a base answers a question.

    Args:
        task: of the adapter that is asked; None: the base alone.
        room: the most tokens of a row that the engine takes.

    Raises:
        BaseModelError: the base is neither a decoder nor an encoder.
    """
    if base.family.decoder_only and (task is None or task.generates):
        return ByWords(base, question, task, room)
    if base.family.is_encoder_decoder:
        raise BaseModelError(f"{base.id} is an encoder-decoder: ask a decoder or an encoder, or train an adapter")
    return BySimilarity(base, question, task, room)


def combine_answers(
    way: Way, first: Sequence[Answer], answers: Sequence[Answer], empty: Sequence[Answer] | None = None
) -> Untrained:
    """The answer about a text.

    Args:
        first: the answers to `Way.first`.
        answers: those to `Way.about` of the text.
        empty: those to `Way.about` of an empty text, to divide out; None: nothing is divided out.
    """
    scores = way.scores(first, answers)
    mass = way.mass(scores)
    if empty is not None:
        scores = [own - prior for own, prior in zip(scores, way.scores(first, empty), strict=True)]
    highest = max(scores)
    weights = [math.exp(each - highest) for each in scores]
    total = math.fsum(weights)
    tokens = sum(int(answer["prompt_tokens"]) for answer in answers)
    chances = {label: each / total for label, each in zip(way.question.labels, weights, strict=True)}
    return Untrained(chances, mass, tokens)


def decide(
    engine: Engine,
    question: Question,
    texts: Sequence[str],
    adapter: Named | None = None,
    task: Task | None = None,
    *,
    prior: bool = False,
) -> list[Untrained]:
    """The answer about each text, in order.

    Args:
        engine: of the base.
        adapter: that changes the base; None: the base alone.
        task: of the adapter.
        prior: divide out what is answered about an empty text.
    """
    way = way_of(engine.base, question, task, room=engine.longest)

    def answers(asks: Sequence[Ask]) -> list[Answer]:
        return engine.answers([replace(ask, adapter=adapter) for ask in asks])

    first = answers(way.first())
    empty = answers(way.about(EMPTY)) if prior else None
    found = list[Untrained]()
    for start in range(0, len(texts), TOGETHER):
        asks = [way.about(text) for text in texts[start : start + TOGETHER]]
        left = iter(answers([ask for own in asks for ask in own]))
        found += [combine_answers(way, first, [next(left) for _ in own], empty) for own in asks]
    return found
