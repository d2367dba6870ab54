"""Ordered levels for a text, or for two texts: stars from 1 to 5, or low, medium and high.

Axes: B examples, K levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from turret.data import Dataset, Example, Labelled, Schema
from turret.data.columns import LABELLED, PAIRED, Roles
from turret.errors import DataError, count_of, quote, quote_all
from turret.tasks.classify import CLASSES, TEXTS, Classify, output_names
from turret.tasks.regression import MAE, NEARNESS, SPEARMAN
from turret.tasks.shapes import Answer, HeadConfig, Metrics, TaskSpec
from turret.tasks.task import Decision, Measure, Mistake, Prediction, TaskSettings, register
from turret.tasks.text_pairs import pair_column_names
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import Kind as FamilyKind

GRADES = ("grade", "level", "stars", "rating")  # column names of levels


@register
class Score(Classify):
    """`Classify` for levels in an order. The head has K - 1 outputs: how surely the level is above each but the last.

    P(level > k) is the sigmoid of output k, made to fall with k; the probability of a level is a difference of two.
    The answer is the median: the first level that is not exceeded with a probability of 0.5 or more.

    Source: Frank and Hall 2001, "A Simple Approach to Ordinal Classification".
    """

    kind: ClassVar[str] = "score"
    metric: ClassVar[str] = "nearness"
    metric_label: ClassVar[str] = "1 - MAE / range"
    right_or_wrong: ClassVar[bool] = False
    measures: ClassVar[Mapping[str, Measure]] = {
        "nearness": NEARNESS,
        "mae": MAE,
        "quadratic_kappa": Measure(
            "quadratic kappa", "agreement beyond chance, where far levels count more; 1 is perfect"
        ),
        "spearman": SPEARMAN,
        **Classify.measures,
        "loss": Measure("loss", "the mean cross-entropy of whether the level is above each one; 0 is perfect", "nats"),
    }
    errors: ClassVar[str] = "the largest errors"
    settings: ClassVar[tuple[str, ...]] = (*CLASSES, "task.levels")

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names: dict[Roles, list[tuple[str, ...]]] = {LABELLED: [(text, level) for text in TEXTS for level in GRADES]}
        names[PAIRED] = pair_column_names(GRADES)
        example = lambda row: Labelled(row.asked_text(), row.label("label"))
        return Schema(cls.kind, names, TEXTS, example, classes=True, show=0)

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        if settings.multi_label or settings.class_weights is not None:
            raise DataError("a score has one level and no class weights: leave task.multi_label and class_weights out")
        return cls(
            in_order(dataset.labels, settings.levels),
            tokenizer,
            settings.max_tokens,
            prefix_text=settings.prefix_text,
            pairs="text_pair" in dataset.columns,
        )

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int | None:
        return len(labels) - 1 or None

    @classmethod
    def head_config(cls, spec: TaskSpec) -> HeadConfig:
        names = [f"above {label}" for label in spec["labels"][:-1]]
        return output_names(names)

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        return f"print({list(spec['labels'])!a}[int((logits.sigmoid().cummin(-1).values >= 0.5).sum())])"

    @classmethod
    def decisions(cls, spec: TaskSpec) -> Mapping[str, Decision]:
        return {"": Decision("score", tuple(spec["labels"]))}

    @property
    def instruction(self) -> str:
        texts = "these two texts" if self.pairs else "this text"
        return f"Grade {texts}, in this order: {', '.join(self.labels)}."

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """mean_b mean_k of the binary cross-entropy of "the level is above k": a scalar.

        Args:
            logits: (B, K - 1).
            targets: level numbers (B,) int64.
        """
        import torch.nn.functional as F

        return F.binary_cross_entropy_with_logits(logits.float(), self._above(targets))

    def linear_targets(self, examples: Sequence[Example]) -> Tensor:
        """One where the level is above level k: (B, K - 1) float32."""
        return self._above(self.targets(examples))

    def guessing_loss(self, examples: Sequence[Example]) -> float:
        """The loss of the shares of examples above each level."""
        import torch

        levels = self.targets(examples)
        shares = torch.stack([(levels > k).double().mean() for k in range(len(self.labels) - 1)])
        return float((torch.special.entr(shares) + torch.special.entr(1 - shares)).mean())

    def _above(self, targets: Tensor) -> Tensor:
        import torch

        return (targets[:, None] > torch.arange(len(self.labels) - 1, device=targets.device)).float()

    def class_scores(self, logits: Tensor) -> Tensor:
        """log P(level): (B, K) float64. logits: (B, K - 1)."""
        import torch

        above = logits.detach().double().sigmoid().cummin(-1).values  # (B, K - 1), falls with k
        ends = above.new_ones(len(above), 1), above.new_zeros(len(above), 1)
        every = torch.cat([ends[0], above, ends[1]], dim=1)
        return (every[:, :-1] - every[:, 1:]).clamp(min=1e-6).log()

    def chosen_classes(self, logits: Tensor) -> list[int]:
        """The number of the median level of each row."""
        return (logits.float().sigmoid().cummin(-1).values >= 0.5).sum(-1).tolist()

    def metrics(self, logits: Tensor, targets: Tensor) -> Metrics:
        """What a classifier has, and nearness, mae, quadratic_kappa and spearman of the numbers of the levels."""
        from turret.tasks import metrics

        given, true, count = self.chosen_classes(logits), targets.tolist(), len(self.labels)
        errors = metrics.numbers([float(each) for each in given], [float(each) for each in true])
        return {
            "nearness": 1 - errors["mae"] / (count - 1),
            "mae": errors["mae"],
            "quadratic_kappa": metrics.quadratic_kappa(given, true, count),
            "spearman": errors["spearman"],
            **super().metrics(logits, targets),
        }

    def worst(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Mistake]:
        """The wrong answers, by the number of levels between; of equal ones the most confident first."""
        found = []
        for each in super().worst(examples, answers):
            given, right = (self.labels.index(str(level)) for level in (each.given, each.right))
            far = count_of(abs(given - right), "level")
            error = f"{far} too {'high' if given > right else 'low'}"
            found.append(dataclasses.replace(each, error=error))
        return sorted(found, key=lambda each: each.score)

    def score(self, given: Prediction, example: Example) -> float:
        """1 - |difference of the levels| / (K - 1)."""
        places = [self.labels.index(str(each)) for each in (given, example.output)]
        return 1 - abs(places[0] - places[1]) / (len(self.labels) - 1)


def in_order(found: Sequence[str], levels: Sequence[str] | None) -> tuple[str, ...]:
    """The levels from the lowest to the highest. Raises DataError if the order is not known.

    Args:
        found: in the training table, numbers by size.
        levels: as the recipe orders them.
    """
    if levels is None:
        if not all(each.lstrip("+-").isdigit() for each in found):
            raise DataError(f'the order of {quote_all(found)} is not known: set task.levels = ["lowest", …, "highest"]')
        return tuple(found)
    if unknown := [each for each in found if each not in levels]:
        raise DataError(f"task.levels lacks {quote(unknown[0], 40)}, which is in the table: name every level")
    return tuple(levels)
