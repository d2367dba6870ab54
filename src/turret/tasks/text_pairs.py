"""Classification of pairs of texts: whether a premise entails a hypothesis, whether two questions are duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from turret.data import Schema
from turret.data.columns import PAIRED
from turret.tasks.classify import Classify
from turret.tasks.task import register

PAIRS = (  # column names of the two texts
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
LABELS = ("label", "labels", "gold_label", "is_duplicate", "class", "relation")


@register
class TextPairs(Classify):
    """`Classify` that reads two texts in one row, in two segments where the base has them."""

    kind: ClassVar[str] = "text_pairs"

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names = {PAIRED: pair_column_names(LABELS)}
        return replace(super().schema(multi_label=multi_label), names=names, inputs=())

    @property
    def instruction(self) -> str:
        return f"Classify how the following two texts are related: {', '.join(self.labels)}."


def pair_column_names(answers: Sequence[str]) -> list[tuple[str, ...]]:
    """The obvious names of the columns of two texts and of their answer."""
    return [(*pair, answer) for pair in PAIRS for answer in answers]
