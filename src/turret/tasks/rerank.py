"""Reranking: how relevant a passage is to a query.

Axes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from turret.data import Dataset, Example, Schema, Scored
from turret.data.columns import PAIRED
from turret.errors import DataError
from turret.tasks.calibration import Calibration, Confidences, fit, temperature_of
from turret.tasks.classify import ECE, LOSS, TextInputs, output_names, stored_settings
from turret.tasks.regression import NumberAnswers, value_of
from turret.tasks.shapes import Answer, HeadConfig, Metrics, TaskSpec
from turret.tasks.task import Measure, Prediction, TaskSettings, register
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import Kind as FamilyKind

QUERIES = ("query", "question", "search", "anchor")  # column names
PASSAGES = ("passage", "document", "text", "candidate", "answer")
RELEVANCE = ("label", "relevance", "relevant", "score")
RIGHT = 0.5  # a passage counts as relevant from this share of the highest relevance on


@register
class Rerank(NumberAnswers):
    """The head's one output is a logit z; sigmoid(z / T) is the relevance, T the calibration's temperature.

    Relevance is a share of the highest in the training table.

    Args:
        highest: relevance in the training table, such as 1, or 3 for grades.
    """

    kind: ClassVar[str] = "rerank"
    pipeline_tag: ClassVar[str] = "text-ranking"
    metric: ClassVar[str] = "accuracy"
    metric_label: ClassVar[str] = "accuracy"
    right_or_wrong: ClassVar[bool] = True
    yes_from: ClassVar[float | None] = RIGHT
    calibrates: ClassVar[bool] = True
    measures: ClassVar[Mapping[str, Measure]] = {
        "accuracy": Measure("accuracy", "the share of pairs that are rightly taken for relevant or not", share=True),
        "loss": LOSS,
        "mrr": Measure("MRR at 10", "1 / the rank of the first relevant passage, as a mean over queries"),
        "ndcg": Measure("nDCG at 10", "how high relevant passages are ranked, as a share of the best order"),
        "ece": ECE,
    }
    errors: ClassVar[str] = "the worst pairs"
    texts: ClassVar[tuple[str, str]] = ("query", "passage")
    instruction: str = "Judge how relevant the second text is to the first."

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int = 256,
        *,
        highest: float = 1.0,
        prefix_text: str = "",
        calibration: Calibration | None = None,
    ) -> None:
        if not highest > 0:
            raise DataError("no passage of the training table is relevant: give the relevant ones a label above 0")
        self.highest, self.calibration = highest, calibration
        self.inputs = TextInputs(self.kind, tokenizer, max_tokens, prefix_text, pairs=True)

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names = [(query, passage, label) for query in QUERIES for passage in PASSAGES for label in RELEVANCE]
        return Schema(cls.kind, {PAIRED: names}, (), lambda row: Scored(row.asked_text(), row.number("label")))

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        highest = max((_relevance(example) for example in dataset.train), default=1.0)
        return cls(tokenizer, settings.max_tokens, highest=highest, prefix_text=settings.prefix_text)

    @classmethod
    def head_config(cls, spec: TaskSpec) -> HeadConfig:
        return output_names(["relevance"])

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        return "print(float(logits[0].sigmoid()))"

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """Relevance from 0 to 1, and the number of the query among these examples: (B, 2) float32."""
        import torch

        queries = dict[str, int]()
        rows = [
            (min(1.0, _relevance(example) / self.highest), float(queries.setdefault(_query(example), len(queries))))
            for example in examples
        ]
        return torch.tensor(rows).reshape(-1, 2)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """mean_b of the binary cross-entropy: a scalar. logits: (B, 1), targets: (B, 2)."""
        import torch.nn.functional as F

        return F.binary_cross_entropy_with_logits(logits.float()[:, 0], targets[:, 0].float())

    def guessing_loss(self, examples: Sequence[Example]) -> float:
        """The entropy of the mean relevance."""
        import torch

        mean = self.targets(examples)[:, 0].double().mean()
        return float(torch.special.entr(mean) + torch.special.entr(1 - mean))

    def metrics(self, logits: Tensor, targets: Tensor) -> Metrics:
        """accuracy, loss and ece; mrr and ndcg, at 10, means over the queries that have a relevant passage here."""
        from turret.tasks import metrics

        given, true = self.values(logits), targets[:, 0].tolist()
        right = sum((g >= RIGHT) == (t >= RIGHT) for g, t in zip(given, true, strict=True))
        loss = float(self.loss(logits / temperature_of(self.calibration), targets))
        found = {"accuracy": right / max(1, len(true)), "loss": loss, "ece": self._sure(logits, targets).error}
        return found | metrics.rankings(given, true, [int(each) for each in targets[:, 1].tolist()])

    def values(self, logits: Tensor) -> list[float]:
        """The relevance of each row from 0 to 1."""
        return _shares(logits, temperature_of(self.calibration))

    def confidences(self, logits: Tensor, examples: Sequence[Example]) -> dict[str, Confidences]:
        """Of every pair: how probably the passage is relevant."""
        return {"": self._sure(logits, self.targets(examples))}

    def _sure(self, logits: Tensor, targets: Tensor) -> Confidences:
        right = (targets[:, 0] >= RIGHT).tolist()
        return Confidences(self.values(logits), _shares(logits, 1.0), right, self.calibration)

    def calibrated(self, logits: Tensor, examples: Sequence[Example], *, chose_weights: bool) -> Self:
        """One temperature for the relevance of all pairs."""
        targets = self.targets(examples)[:, :1]
        return self.with_calibration(fit(logits, targets, multi_label=True, chose_weights=chose_weights))

    def numbers(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[tuple[float, float]]:
        """Both as shares of the highest relevance."""
        return [(right / self.highest, given) for right, given in super().numbers(examples, answers)]

    def score(self, given: Prediction, example: Example) -> float:
        """1 if both say relevant, or both say not."""
        return float((float(str(given)) >= RIGHT) == (_relevance(example) / self.highest >= RIGHT))

    @classmethod
    def line(cls, answer: Answer) -> str:
        return f"{float(answer['value']):.3f}"

    def spec(self) -> TaskSpec:
        return super().spec() | {"highest": self.highest, "pairs": True}

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        return cls(tokenizer, **stored_settings(spec, "pairs"))


def _shares(logits: Tensor, temperature: float) -> list[float]:
    return (logits.detach().double()[:, 0] / temperature).sigmoid().tolist()


def _relevance(example: Example) -> float:
    value = value_of(example)
    if value < 0:
        raise DataError(f"the relevance {value:g} is below 0: expected 0 for a passage that is not relevant, else more")
    return value


def _query(example: Example) -> str:
    asked = example.asked
    return asked if isinstance(asked, str) else getattr(asked, "text", str(asked))
