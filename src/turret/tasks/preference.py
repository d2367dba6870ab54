"""Preferences: of two answers to a conversation, the better one is made more likely, by DPO or ORPO.

Axes: B examples; of two answers the first is the chosen one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from turret.data import Dataset, Example, Preferred, Schema, Turn
from turret.data.columns import COMPARED
from turret.data.conversations import preferred_in
from turret.errors import DataError
from turret.tasks.chat import Chat
from turret.tasks.shapes import Answer, Metrics, TaskSpec
from turret.tasks.task import Encoded, Measure, Mistake, Prediction, TaskSettings, register
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import Kind as FamilyKind

CHOSEN, REJECTED = "chosen", "rejected"
NAMES = (("prompt", CHOSEN, REJECTED), ("question", CHOSEN, REJECTED), ("instruction", CHOSEN, REJECTED))


@register
class Preference(Chat):
    """`Chat` that learns from two answers. It trains without dropout, and answers as a chat does."""

    kind: ClassVar[str] = "preference"
    metric: ClassVar[str] = "accuracy"
    metric_label: ClassVar[str] = "chosen answers that are more likely"
    right_or_wrong: ClassVar[bool] = True
    baselines: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[Mapping[str, Measure]] = {
        "accuracy": Measure("accuracy", "the share of pairs whose chosen answer is more likely", share=True),
        "margin": Measure("margin", "how much more likely the chosen answer is, times beta"),
        "loss": Measure("loss", "what the training minimises: DPO, or ORPO with the cross-entropy of a token", "nats"),
    }
    errors: ClassVar[str] = "the pairs with the most wrong margin"
    sides: ClassVar[tuple[str, str]] = ("chosen", "more likely")
    two_answers: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = (*Chat.settings, "task.loss", "task.beta", "task.reference")
    rate_ratio: ClassVar[float] = 0.1
    objective: Literal["dpo", "orpo"] = "dpo"
    beta: float = 0.1
    reference: str | None = None

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names = {("system", *COMPARED): [("system", *each) for each in NAMES], COMPARED: NAMES}
        return Schema(cls.kind, names, (), preferred_in, show=2, answers=2, converses=True)

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        if settings.loss_on == "assistant":
            raise DataError("a preference compares last answers: leave task.loss_on out")
        if settings.loss not in (None, "dpo", "orpo"):
            raise DataError(f"task.loss = {settings.loss!r} does not fit preferences: expected dpo or orpo")
        if settings.loss == "orpo" and settings.reference is not None:
            raise DataError("orpo compares with nothing: leave task.reference out, or set task.loss to dpo")
        made = super().make(settings, dataset, tokenizer, family_kind)
        made.reference = settings.reference
        made.objective = "orpo" if settings.loss == "orpo" else "dpo"
        made.loss_on, made.beta = "last", settings.beta or 0.1
        return made

    def encode_examples(self, examples: Sequence[Example]) -> list[tuple[Encoded, Encoded | None]]:
        """The prompts, and both answers. For ORPO the loss counts the tokens of the prompt too, as TRL does.

        Examples with one answer are encoded as those of a chat.
        """
        import torch

        if not all(isinstance(example, Preferred) for example in examples):
            return super().encode_examples(examples)
        encoded: list[tuple[Encoded, Encoded | None]] = []
        for example in examples:
            assert isinstance(example, Preferred)
            fitted = self._fit_prompt(example.asked)
            better, worse = (
                self._answer(fitted, Turn("assistant", text)) for text in (example.chosen, example.rejected)
            )
            source = self._encode_prompt(fitted)
            if self.objective == "orpo":
                source = dataclasses.replace(source, earlier=torch.arange(1, len(source.ids)))
            cut = better.cut or worse.cut
            encoded.append((source, dataclasses.replace(better, rival=worse.ids, cut=cut)))
        return encoded

    def preference_loss(self, scores: Tensor, reference: Tensor | None, counts: Tensor, loss: Tensor | None) -> Tensor:
        """The mean over examples: a scalar.

        DPO: -log sigmoid(beta ((s_1 - r_1) - (s_2 - r_2))), where s and r are log-probabilities of the two answers with
        the adapter and with the reference: the bare base or a stored version.
        ORPO: loss - beta log sigmoid(log odds(p_1) - log odds(p_2)), where log p is the mean of a token and
        odds(p) = p / (1 - p).

        Source: Rafailov et al. 2023, "Direct Preference Optimization"; Hong et al. 2024, "ORPO".

        Args:
            scores: the log-probabilities of both answers (B, 2).
            reference: those of the reference, for DPO.
            counts: the tokens of both answers (B, 2).
            loss: the mean of -log p over the tokens of chosen conversations, for ORPO. Of a piece of a batch it is
                weighted, see `turret.train.losses.compare_answers`.
        """
        import torch
        import torch.nn.functional as F

        if reference is not None:
            margins = (scores - reference)[:, 0] - (scores - reference)[:, 1]
            return -F.logsigmoid(self.beta * margins).mean()
        assert loss is not None
        mean = scores / counts
        odds = mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6)))
        return loss - self.beta * F.logsigmoid(odds[:, 0] - odds[:, 1]).mean()

    def margins(self, scores: Tensor, reference: Tensor | None, counts: Tensor) -> Tensor:
        """How much more likely the chosen answer is (B,): against the reference for DPO, by a token's mean else."""
        rewards = self.beta * (scores / counts if reference is None else scores - reference)
        return rewards[:, 0] - rewards[:, 1]

    def guessing_loss(self, examples: Sequence[Example]) -> float | None:
        return math.log(2) if self.objective == "dpo" else None

    def compare_margins(self, margins: Sequence[float], loss: float) -> tuple[Metrics, list[Answer]]:
        """The metrics of some margins, and an answer for each: the answer that is more likely."""
        right = sum(each > 0 for each in margins)
        count = max(1, len(margins))
        metrics = {"accuracy": right / count, "margin": math.fsum(margins) / count, "loss": loss}
        return metrics, [{"label": CHOSEN if each > 0 else REJECTED, "margin": each} for each in margins]

    def worst(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Mistake]:
        """The pairs whose rejected answer is more likely, the lowest margin first."""
        found = []
        for row, (example, answer) in enumerate(zip(examples, answers, strict=True)):
            if isinstance(example, Preferred) and answer["margin"] <= 0:
                error = f"margin {answer['margin']:.3g}"
                found.append(Mistake(row, example.asked, example.chosen, example.rejected, 0.0, error=error))
        return sorted(found, key=lambda each: float(answers[each.row]["margin"]))

    @classmethod
    def prediction_of(cls, answer: Answer) -> Prediction:
        return str(answer["label"] if "label" in answer else answer["text"])

    @classmethod
    def score(cls, given: Prediction, example: Example) -> float:
        return float(given == CHOSEN)

    def spec(self) -> TaskSpec:
        own: TaskSpec = {} if self.reference is None else {"reference": self.reference}
        return super().spec() | {"objective": self.objective, "beta": self.beta} | own

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        made = super().from_spec(spec, tokenizer)
        made.objective, made.beta, made.reference = spec["objective"], float(spec["beta"]), spec.get("reference")
        return made
