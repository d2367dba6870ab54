"""A toy task: grade a text. The head has one output, trained by the squared error.

The squared error is the negative log-likelihood of a normal distribution. So the answer is the nearest grade, and its
probability is the normal density there, normalized over the known grades.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from turret.data import Dataset, Example, Input, Labelled, Schema
from turret.data.columns import LABELLED
from turret.tasks import Prediction
from turret.tasks.classify import HeadAnswers, TextInputs
from turret.tasks.shapes import Answer, HeadConfig, Metrics, TaskSpec
from turret.tasks.task import TaskSettings
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class Rate(HeadAnswers):
    """Gives a text one of a list of grades, such as 1 to 5."""

    kind: ClassVar[str] = "rate"
    metric: ClassVar[str] = "closeness"
    metric_label: ClassVar[str] = "closeness"
    right_or_wrong: ClassVar[bool] = False
    baselines: ClassVar[tuple[str, ...]] = ()
    multi_label = False
    instruction = "Say how good the following text is."

    def __init__(self, labels: Sequence[str], tokenizer: Tokenizer, max_tokens: int = 64) -> None:
        self.labels, self.inputs = tuple(labels), TextInputs(self.kind, tokenizer, max_tokens, "", pairs=False)

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names = {LABELLED: [("text", "grade"), ("review", "grade")]}
        example = lambda row: Labelled(row.text("text"), row.label("label"))
        return Schema(cls.kind, names, ("text", "review"), example, classes=True)

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: str) -> Rate:
        return cls(dataset.labels, tokenizer, settings.max_tokens)

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Rate:
        return cls(spec["labels"], tokenizer, spec["max_tokens"])

    def spec(self) -> TaskSpec:
        return {"kind": self.kind, "labels": list(self.labels), "max_tokens": self.max_tokens}

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int:
        return 1

    @classmethod
    def head_config(cls, spec: TaskSpec) -> HeadConfig:
        return {"problem_type": "regression"}

    def targets(self, examples: Sequence[Example]) -> Tensor:
        import torch

        return torch.tensor([float(str(example.output)) for example in examples])  # (B,)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.float()[:, 0] - targets).square().mean() / 2  # (B, 1), (B,) -> ()

    def guessing_loss(self, examples: Sequence[Example]) -> float:
        return float(self.targets(examples).var(correction=0)) / 2

    def metrics(self, logits: Tensor, targets: Tensor) -> Metrics:
        examples = [Labelled("", f"{grade:g}") for grade in targets.tolist()]
        grades = [answer["label"] for answer in self.answers(logits)]
        scores = [self.score(grade, example) for grade, example in zip(grades, examples, strict=True)]
        return {self.metric: sum(scores) / len(scores), "loss": float(self.loss(logits, targets))}

    def answers(self, logits: Tensor, inputs: Sequence[Input] = ()) -> list[Answer]:
        import torch

        grades = torch.tensor([float(label) for label in self.labels]).double()  # (G,)
        shares = (-(logits.double() - grades).square() / 2).softmax(-1)  # (B, 1), (G,) -> (B, G)
        rows = [dict(zip(self.labels, row, strict=True)) for row in shares.tolist()]
        return [{"label": max(row, key=row.__getitem__), "probabilities": row} for row in rows]

    @classmethod
    def prediction_of(cls, answer: Answer) -> str:
        return str(answer["label"])

    @classmethod
    def score(cls, given: Prediction, example: Example) -> float:
        return 1 / (1 + abs(float(str(given)) - float(str(example.output))))

    @classmethod
    def line(cls, answer: Answer) -> str:
        return f"grade {answer['label']}"


class Order(Rate):
    """The same with a loss over the batch: of two texts the better one gets the higher number.

    The mean over pairs with y_i > y_j of log(1 + exp(z_j - z_i)), and a hundredth of the squared error for the scale.
    Source: Burges et al. 2005, "Learning to Rank using Gradient Descent".
    """

    kind: ClassVar[str] = "order"
    spans: ClassVar[Literal["row", "batch"]] = "batch"

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        example = lambda row: Labelled(row.text("text"), row.label("label"))
        return Schema(cls.kind, {LABELLED: [("text", "rank")]}, ("text",), example, classes=True)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        import torch.nn.functional as F

        given, wanted = logits.float()[:, 0], targets
        better = wanted[:, None] > wanted  # (B, B)
        pairs = F.softplus(given - given[:, None])[better].sum() / max(1, int(better.sum()))
        return pairs + super().loss(logits, targets) / 100

    def guessing_loss(self, examples: Sequence[Example]) -> None:
        return None
