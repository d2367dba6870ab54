"""A toy task: how good a text is, as a number. One output of a linear head, trained by the squared error.

The squared error is the log-likelihood of a normal distribution, so the answer is the nearest grade, and its
probability the normal's density there among the known grades.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from turret.data import Labelled, Schema
from turret.data.cells import label_of
from turret.data.columns import LABELLED
from turret.tasks import Encoded
from turret.tasks.tokens import Tokens


class Rate:
    """Grades, such as 1 to 5, and how a text is encoded to be given one."""

    kind = "rate"
    request = "classify"
    generates = False
    pipeline_tag = "text-classification"
    metric = "closeness"
    metric_label = "closeness"
    right_or_wrong = False
    multi_label = False
    instruction = "Say how good the following text is."

    def __init__(self, labels: Sequence[str], tokenizer: Any, max_tokens: int = 64) -> None:
        self.labels, self.max_tokens, self._tokens = tuple(labels), max_tokens, Tokens(tokenizer)

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names = {LABELLED: [("text", "grade"), ("review", "grade")]}
        return Schema(
            cls.kind, names, ("text", "review"), lambda cell, _, __: label_of(cell, (), False), Labelled, classes=True
        )

    @classmethod
    def make(cls, settings: Any, dataset: Any, tokenizer: Any, family_kind: str) -> Rate:
        return cls(dataset.labels, tokenizer, settings.max_tokens)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tokenizer: Any) -> Rate:
        return cls(spec["labels"], tokenizer, spec["max_tokens"])

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "labels": list(self.labels), "max_tokens": self.max_tokens}

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int:
        return 1

    @classmethod
    def head_config(cls, spec: Mapping[str, Any]) -> dict[str, Any]:
        return {"problem_type": "regression"}

    def encode_sources(self, texts: Sequence[str]) -> list[Encoded]:
        import torch

        before, after = self._tokens.before, self._tokens.after
        room = self.max_tokens - len(before) - len(after)
        rows = self._tokens.plain(texts, most=room)
        return [Encoded(torch.tensor([*before, *ids[:room], *after]), len(ids) > room) for ids in rows]

    def encode_examples(self, examples: Sequence[Labelled]) -> list[tuple[Encoded, None]]:
        return [(source, None) for source in self.encode_sources([example.text for example in examples])]

    def targets(self, examples: Sequence[Labelled]) -> Any:
        import torch

        return torch.tensor([float(str(example.label)) for example in examples])  # (B,)

    def loss(self, logits: Any, targets: Any) -> Any:
        return (logits.float()[:, 0] - targets).square().mean() / 2  # (B, 1), (B,) -> ()

    def guessing_loss(self, examples: Sequence[Labelled]) -> float:
        return float(self.targets(examples).var(correction=0)) / 2

    def metrics(self, logits: Any, targets: Any) -> dict[str, Any]:
        wanted = [Labelled("", f"{grade:g}") for grade in targets.tolist()]
        scores = [self.score(answer["label"], each) for answer, each in zip(self.answers(logits), wanted, strict=True)]
        return {self.metric: sum(scores) / len(scores), "loss": float(self.loss(logits, targets))}

    def answers(self, logits: Any) -> list[dict[str, Any]]:
        import torch

        grades = torch.tensor([float(label) for label in self.labels]).double()  # (G,)
        shares = (-(logits.double() - grades).square() / 2).softmax(-1)  # (B, 1), (G,) -> (B, G)
        rows = [dict(zip(self.labels, row, strict=True)) for row in shares.tolist()]
        return [{"label": max(row, key=row.__getitem__), "probabilities": row} for row in rows]

    @classmethod
    def judged(cls, answer: Mapping[str, Any]) -> str:
        return str(answer["label"])

    @classmethod
    def score(cls, given: Any, example: Labelled) -> float:
        return 1 / (1 + abs(float(given) - float(str(example.label))))

    @classmethod
    def line(cls, answer: Mapping[str, Any]) -> str:
        return f"grade {answer['label']}"
