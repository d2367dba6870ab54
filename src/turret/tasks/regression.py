"""Regression: a number for a text, or for two texts, such as how similar they are.

Axes: B examples.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from turret.data import Dataset, Example, Input, Schema, Scored
from turret.data.columns import LABELLED, PAIRED, Roles
from turret.errors import DataError
from turret.tasks.classify import TEXTS, HeadAnswers, TextInputs, output_names, stored_settings
from turret.tasks.shapes import Answer, HeadConfig, Metrics, TaskSpec
from turret.tasks.task import Gives, Measure, Mistake, Prediction, TaskSettings, register
from turret.tasks.text_pairs import pair_column_names
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import Kind as FamilyKind

NEARNESS = Measure("1 - MAE / range", "how near answers are, as a share of the range; 1 is perfect", share=True)
MAE = Measure("MAE", "the mean distance of an answer from the right one")
SPEARMAN = Measure("Spearman", "the correlation of the ranks of answers and right ones; 1 is the same order")
VALUES = ("score", "value", "similarity", "similarity_score", "relatedness_score")  # column names of numbers


class NumberAnswers(HeadAnswers):
    """Answers of one number each, from the head's one output."""

    gives: ClassVar[Gives] = "numbers"
    errors: ClassVar[str] = "the largest residuals"

    @abstractmethod
    def values(self, logits: Tensor) -> list[float]:
        """The numbers (B,). logits: (B, 1)."""

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int | None:
        return 1

    def answers(self, logits: Tensor, inputs: Sequence[Input] = ()) -> list[Answer]:
        """`{"value"}` for each row."""
        return [{"value": value} for value in self.values(logits)]

    @classmethod
    def prediction_of(cls, answer: Answer) -> Prediction:
        return f"{float(answer['value']):.6g}"

    def numbers(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[tuple[float, float]]:
        both = zip(examples, answers, strict=True)
        return [(value_of(example), float(answer["value"])) for example, answer in both]

    def worst(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Mistake]:
        """The answers that are not right, by the size of their residuals: answered less right."""
        found = []
        pairs = self.numbers(examples, answers)
        for each in super().worst(examples, answers):
            right, given = pairs[each.row]
            error = f"{given - right:+.3g}"
            found.append(dataclasses.replace(each, right=f"{right:.4g}", given=f"{given:.4g}", error=error))
        return sorted(found, key=lambda each: -abs(operator.sub(*pairs[each.row])))


@register
class Regression(NumberAnswers):
    """The head's one output is the number in units of the training values: (y - mean) / deviation.

    Args:
        mean, deviation: of the training values.
        low, high: the lowest and the highest of them, which `nearness` divides by.
        pairs: whether two texts are read together.
    """

    kind: ClassVar[str] = "regression"
    metric: ClassVar[str] = "nearness"
    metric_label: ClassVar[str] = "1 - MAE / range"
    baselines: ClassVar[tuple[str, ...]] = ("linear",)
    measures: ClassVar[Mapping[str, Measure]] = {
        "nearness": NEARNESS,
        "mae": MAE,
        "rmse": Measure("RMSE", "the root of the mean squared distance, so that large errors count more"),
        "pearson": Measure("Pearson", "the correlation of answers and right numbers; 1 is a straight line upwards"),
        "spearman": SPEARMAN,
        "loss": Measure(
            "loss", "the mean squared error; 1 is what the mean of the training values gives", "× variance"
        ),
    }

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int = 256,
        *,
        mean: float,
        deviation: float,
        low: float,
        high: float,
        pairs: bool,
        prefix_text: str = "",
    ) -> None:
        if not (deviation > 0 and math.isfinite(mean) and math.isfinite(deviation) and low < high):
            raise DataError("all training values are equal, so nothing can be learnt: name another column of numbers")
        self.mean, self.deviation, self.low, self.high = mean, deviation, low, high
        self.inputs = TextInputs(self.kind, tokenizer, max_tokens, prefix_text, pairs=pairs)

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names: dict[Roles, list[tuple[str, ...]]] = {PAIRED: pair_column_names(VALUES)}
        names[LABELLED] = [(text, value) for text in TEXTS for value in VALUES]
        return Schema(cls.kind, names, TEXTS, lambda row: Scored(row.asked_text(), row.number("label")), show=2)

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        values = [value_of(example) for example in dataset.train]
        mean = math.fsum(values) / max(1, len(values))
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in values) / max(1, len(values)))
        return cls(
            tokenizer,
            settings.max_tokens,
            mean=mean,
            deviation=deviation,
            low=min(values, default=0.0),
            high=max(values, default=0.0),
            pairs="text_pair" in dataset.columns,
            prefix_text=settings.prefix_text,
        )

    @classmethod
    def head_config(cls, spec: TaskSpec) -> HeadConfig:
        return {"problem_type": "regression"} | output_names(["value"])

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        return f"print(float(logits[0]) * {float(spec['deviation'])!r} + {float(spec['mean'])!r})"

    @property
    def instruction(self) -> str:
        return f"Give {'these two texts' if self.pairs else 'this text'} a number from {self.low:g} to {self.high:g}."

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """(B,) float32, in units of the training values."""
        import torch

        values = torch.tensor([value_of(example) for example in examples], dtype=torch.float64)
        return ((values - self.mean) / self.deviation).float()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """mean_b (z_b - y_b)^2: a scalar. logits: (B, 1), targets: (B,)."""
        import torch.nn.functional as F

        return F.mse_loss(logits.float()[:, 0], targets.float())

    def guessing_loss(self, examples: Sequence[Example]) -> float:
        """The variance of the targets: the loss of their mean."""
        return float(self.targets(examples).var(correction=0))

    def values(self, logits: Tensor) -> list[float]:
        return (logits.detach().double()[:, 0] * self.deviation + self.mean).tolist()

    def metrics(self, logits: Tensor, targets: Tensor) -> Metrics:
        """nearness, mae, rmse, pearson and spearman in units of the data; loss in units of the training values."""
        from turret.tasks import metrics

        true = (targets.double() * self.deviation + self.mean).tolist()
        found = metrics.numbers(self.values(logits), true)
        nearness = 1 - found["mae"] / (self.high - self.low)
        return {"nearness": nearness, **found, "loss": float(self.loss(logits, targets))}

    def score(self, given: Prediction, example: Example) -> float:
        """1 - |error| / range of the training values, at least 0."""
        return max(0.0, 1 - abs(float(str(given)) - value_of(example)) / (self.high - self.low))

    @classmethod
    def line(cls, answer: Answer) -> str:
        return f"{float(answer['value']):.4g}"

    def spec(self) -> TaskSpec:
        own: TaskSpec = {"mean": self.mean, "deviation": self.deviation, "low": self.low, "high": self.high}
        return super().spec() | own | {"pairs": self.pairs}

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        return cls(tokenizer, **stored_settings(spec))


def value_of(example: Example) -> float:
    """The right number of an example."""
    return example.value if isinstance(example, Scored) else float(str(example.output))
