"""A toy task: grade a text. The head has one output, trained by the squared error.

The squared error is the negative log-likelihood of a normal distribution. So the answer is the nearest grade, and its
probability is the normal density there, normalized over the known grades.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from turret.data import Dataset, Example, Labelled, Schema
from turret.data.columns import LABELLED
from turret.json_types import JsonMapping, JsonObject
from turret.tasks import Encoded, Prediction
from turret.tasks.task import TaskSettings
from turret.tasks.tokens import Tokens
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class Rate:
    """Gives a text one of a list of grades, such as 1 to 5."""

    kind: ClassVar[str] = "rate"
    request: ClassVar[Literal["classify"]] = "classify"
    generates: ClassVar[Literal[False]] = False
    calibrates: ClassVar[bool] = False
    pipeline_tag: ClassVar[str] = "text-classification"
    metric: ClassVar[str] = "closeness"
    metric_label: ClassVar[str] = "closeness"
    right_or_wrong: ClassVar[bool] = False
    baselines: ClassVar[tuple[str, ...]] = ()
    multi_label = False
    pairs = False
    instruction = "Say how good the following text is."

    def __init__(self, labels: Sequence[str], tokenizer: Tokenizer, max_tokens: int = 64) -> None:
        self.labels, self.max_tokens, self._tokens = tuple(labels), max_tokens, Tokens(tokenizer)

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names = {LABELLED: [("text", "grade"), ("review", "grade")]}
        example = lambda row: Labelled(row.text("text"), row.label("label"))
        return Schema(cls.kind, names, ("text", "review"), example, classes=True)

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: str) -> Rate:
        return cls(dataset.labels, tokenizer, settings.max_tokens)

    @classmethod
    def from_spec(cls, spec: JsonMapping, tokenizer: Tokenizer) -> Rate:
        return cls(spec["labels"], tokenizer, spec["max_tokens"])

    def spec(self) -> JsonObject:
        return {"kind": self.kind, "labels": list(self.labels), "max_tokens": self.max_tokens}

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int:
        return 1

    @classmethod
    def head_config(cls, spec: JsonMapping) -> JsonObject:
        return {"problem_type": "regression"}

    def encode_sources(self, texts: Sequence[str]) -> list[Encoded]:
        import torch

        before, after = self._tokens.before, self._tokens.after
        room = self.max_tokens - len(before) - len(after)
        rows = self._tokens.plain(texts, most=room)
        return [Encoded(torch.tensor([*before, *ids[:room], *after]), len(ids) > room) for ids in rows]

    def encode_examples(self, examples: Sequence[Example]) -> list[tuple[Encoded, Encoded | None]]:
        return [(source, None) for source in self.encode_sources([example.input for example in examples])]

    def targets(self, examples: Sequence[Example]) -> Tensor:
        import torch

        return torch.tensor([float(str(example.output)) for example in examples])  # (B,)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.float()[:, 0] - targets).square().mean() / 2  # (B, 1), (B,) -> ()

    def guessing_loss(self, examples: Sequence[Example]) -> float:
        return float(self.targets(examples).var(correction=0)) / 2

    def metrics(self, logits: Tensor, targets: Tensor) -> JsonObject:
        examples = [Labelled("", f"{grade:g}") for grade in targets.tolist()]
        grades = [answer["label"] for answer in self.answers(logits)]
        scores = [self.score(grade, example) for grade, example in zip(grades, examples, strict=True)]
        return {self.metric: sum(scores) / len(scores), "loss": float(self.loss(logits, targets))}

    def answers(self, logits: Tensor) -> list[JsonObject]:
        import torch

        grades = torch.tensor([float(label) for label in self.labels]).double()  # (G,)
        shares = (-(logits.double() - grades).square() / 2).softmax(-1)  # (B, 1), (G,) -> (B, G)
        rows = [dict(zip(self.labels, row, strict=True)) for row in shares.tolist()]
        return [{"label": max(row, key=row.__getitem__), "probabilities": row} for row in rows]

    @classmethod
    def judged(cls, answer: JsonMapping) -> str:
        return str(answer["label"])

    @classmethod
    def score(cls, given: Prediction, example: Example) -> float:
        return 1 / (1 + abs(float(str(given)) - float(str(example.output))))

    @classmethod
    def line(cls, answer: JsonMapping) -> str:
        return f"grade {answer['label']}"
