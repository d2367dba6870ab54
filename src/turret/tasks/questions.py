"""Several questions on one text, or on two: a class for each of several columns, from one adapter.

The outputs of its one head are the classes of all columns, one column after another.

Axes: B examples, C classes of all questions, Q questions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from turret.data import Dataset, Example, Input, Labelled, Schema
from turret.data.cells import by_column, in_order, question_in
from turret.data.columns import LABELLED, PAIRED, Roles
from turret.data.table import answer_to
from turret.errors import DataError, quote, quote_all
from turret.tasks.calibration import FEWEST, Calibration, Confidences, fit, stored_by_question, temperature_of
from turret.tasks.classify import (
    CLASSES,
    ECE,
    LOSS,
    TEXTS,
    Classify,
    HeadAnswers,
    TextInputs,
    balanced_weights,
    constant_loss,
    output_names,
    stored_settings,
)
from turret.tasks.shapes import Answer, HeadConfig, Metrics, TaskSpec, numbers_in, parts_in
from turret.tasks.task import Decision, Measure, Prediction, Task, TaskSettings, register
from turret.tasks.text_pairs import pair_column_names
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import Kind as FamilyKind

NONE = -1  # the target of a question that a text has no answer to


@register
class Questions(HeadAnswers):
    """The classes of each question, in the order of the logits, and how a text is encoded.

    Args:
        labels: each `question: class`; those of a question follow one another.
        pairs: whether two texts are read together.
        class_weights: of classes in the loss, by `question: class`; 1 for the others.
        calibrations: of each question that had enough validation examples with an answer.
    """

    kind: ClassVar[str] = "questions"
    calibrates: ClassVar[bool] = True
    metric: ClassVar[str] = "accuracy"
    metric_label: ClassVar[str] = "accuracy"
    measures: ClassVar[Mapping[str, Measure]] = {
        "accuracy": Measure("accuracy", "the share of its questions that a text has right, as a mean", share=True),
        "macro_f1": Measure("macro F1", "the mean over questions of the mean of the F1 of all classes", share=True),
        "loss": LOSS,
        "ece": ECE,
    }
    errors: ClassVar[str] = "the texts with the most wrong answers"
    settings: ClassVar[tuple[str, ...]] = (*CLASSES, "task.class_weights")
    multi_label: bool = True

    def __init__(
        self,
        labels: Sequence[str],
        tokenizer: Tokenizer,
        max_tokens: int = 256,
        *,
        pairs: bool = False,
        prefix_text: str = "",
        class_weights: Mapping[str, float] | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> None:
        if unknown := sorted(set(class_weights or {}) - set(labels)):
            raise DataError(
                f"task.class_weights names {quote(unknown[0])}, which is no answer: the answers are {quote_all(labels)}"
            )
        self.labels = tuple(labels)
        self.parts = _parts(labels)
        self.class_weights = None if class_weights is None else dict(class_weights)
        self.calibrations = dict(calibrations or {})
        self.inputs = TextInputs(self.kind, tokenizer, max_tokens, prefix_text, pairs=pairs)

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names: dict[Roles, list[tuple[str, ...]]] = {PAIRED: pair_column_names(("label",))}
        names[LABELLED] = [(text, "label") for text in TEXTS]
        example = lambda row: Labelled(row.asked_text(), row.answers("label"))
        return Schema(cls.kind, names, TEXTS, example, classes=True, many=True, show=2, several=True)

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        if settings.multi_label:
            raise DataError("each of several questions has one class: leave task.multi_label out")
        weights = settings.class_weights
        if weights == "balanced":
            weights = {}
            for own in (dataset.labels[part] for part in _parts(dataset.labels).values()):
                given = [Labelled("", label) for example in dataset.train for label in example.labels if label in own]
                weights |= balanced_weights(own, given, multi_label=False)
        return cls(
            _ordered_classes(dataset),
            tokenizer,
            settings.max_tokens,
            pairs="text_pair" in dataset.columns,
            prefix_text=settings.prefix_text,
            class_weights=weights,
        )

    @classmethod
    def labels_of_outputs(cls, names: Sequence[str]) -> tuple[str, ...]:
        """The names, each `question: class`. Raises DataError for others."""
        _parts(names)
        return tuple(names)

    @classmethod
    def head_config(cls, spec: TaskSpec) -> HeadConfig:
        return output_names(spec["labels"])

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        ends = [(part.start, part.stop) for part in _parts(spec["labels"]).values()]
        return f"print([labels[start + int(logits[start:end].argmax())] for start, end in {ends}])"

    @property
    def instruction(self) -> str:
        return f"Classify the following text by {', '.join(self.parts)}."

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """The number of the class among those of its question, NONE without an answer: (B, Q) int64."""
        import torch

        rows = torch.full((len(examples), len(self.parts)), NONE)
        place = {label: number for number, label in enumerate(self.labels)}
        column = {question: number for number, question in enumerate(self.parts)}
        for row, example in enumerate(examples):
            for label in example.labels:
                if label not in place:
                    raise DataError(
                        f"answer {quote(label)} is unknown to this version: it knows {quote_all(self.labels)}"
                    )
                question = question_in(label)
                rows[row, column[question]] = place[label] - self.parts[question].start
        return rows

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """mean_b mean_q w[y_bq] cross_entropy_bq over the questions that example b answers: a scalar.

        Args:
            logits: (B, C).
            targets: (B, Q) int64.
        """
        return (self._losses(logits, targets).sum(1) / _count_answered(targets)).mean()

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, Q), 0 without an answer."""
        import torch
        import torch.nn.functional as F

        logits, known = logits.float(), self.class_weights or {}
        parts = list(self.parts.values())
        weights: Sequence[Tensor | None] = [None] * len(parts)
        if known:
            every = torch.tensor([known.get(label, 1.0) for label in self.labels], device=logits.device)  # (C,)
            weights = [every[part] for part in parts]
        return torch.stack(
            [
                F.cross_entropy(logits[:, part], own, weight, ignore_index=NONE, reduction="none")
                for part, own, weight in zip(parts, targets.unbind(1), weights, strict=True)
            ],
            dim=1,
        )

    def guessing_loss(self, examples: Sequence[Example]) -> float:
        """The loss of the best constant answers: the sum over questions of what `Classify` has for one.

        A text with few answers counts more for each of them.
        """
        import torch

        targets = self.targets(examples)
        share = 1 / _count_answered(targets).double()  # (B,)
        found = 0.0
        for part, own in zip(self.parts.values(), targets.unbind(1), strict=True):
            there = own != NONE
            weights = torch.tensor([(self.class_weights or {}).get(label, 1.0) for label in self.labels[part]])
            counts = torch.bincount(own[there], share[there], minlength=len(weights)) * weights
            found += float(constant_loss(counts / len(targets)))
        return found

    def metrics(self, logits: Tensor, targets: Tensor) -> Metrics:
        """accuracy, the mean over texts of the share of right answers; macro_f1 and ece, means over questions; loss.

        And by question accuracy, macro_f1, loss, ece and the number of answers, and a report for each class. Questions
        without an example do not count. loss and ece are of the answers' probabilities.
        """
        from turret.tasks import metrics

        losses, right = self._losses(self._tempered_logits(logits), targets), targets.new_zeros(targets.shape)
        sure = self._sure(logits, targets)
        by_question, classes = dict[str, dict[str, float]](), dict[str, Mapping[str, float]]()
        for place, (question, part) in enumerate(self.parts.items()):
            there = targets[:, place] != NONE
            given, true = logits[there, part].argmax(-1), targets[there, place]
            right[there, place] = (given == true).long()
            loss = float(losses[there, place].sum() / there.sum().clamp(min=1))
            found = metrics.one_class(given.tolist(), true.tolist(), self.labels[part], loss)
            classes |= parts_in(found, "per_class")
            by_question[question] = numbers_in(found) | {"ece": sure[question].error, "examples": len(true)}
        asked = [each for each in by_question.values() if each["examples"]] or list(by_question.values())
        return {
            "accuracy": float((right.sum(1) / _count_answered(targets)).mean()),
            "macro_f1": sum(each["macro_f1"] for each in asked) / len(asked),
            "loss": float((losses.sum(1) / _count_answered(targets)).mean()),
            "ece": sum(each["ece"] for each in asked) / len(asked),
            "per_question": by_question,
            "per_class": classes,
        }

    def _tempered_logits(self, logits: Tensor) -> Tensor:
        """The logits of each question divided by its temperature: (B, C) float64."""
        import torch

        temperatures = torch.ones(len(self.labels), dtype=torch.float64)
        for question, part in self.parts.items():
            temperatures[part] = temperature_of(self.calibrations.get(question))
        return logits.detach().double() / temperatures.to(logits.device)

    def confidences(self, logits: Tensor, examples: Sequence[Example]) -> dict[str, Confidences]:
        return self._sure(logits, self.targets(examples))

    def _sure(self, logits: Tensor, targets: Tensor) -> dict[str, Confidences]:
        """Of the texts that answer each question."""
        found, tempered = dict[str, Confidences](), self._tempered_logits(logits)
        for place, (question, part) in enumerate(self.parts.items()):
            there = targets[:, place] != NONE
            sure, chosen = tempered[there, part].softmax(-1).max(-1)
            raw = logits[there, part].detach().double().softmax(-1).amax(-1)
            right = chosen == targets[there, place]
            found[question] = Confidences(sure.tolist(), raw.tolist(), right.tolist(), self.calibrations.get(question))
        return found

    def classifier_of(self, decision: str, logits: Tensor) -> tuple[Task, Tensor]:
        part = self.parts[decision]
        names = [label.removeprefix(answer_to(decision, "")) for label in self.labels[part]]
        own = Classify(names, self.tokenizer, self.max_tokens, calibration=self.calibrations.get(decision))
        return own, logits[:, part]

    def calibrated(self, logits: Tensor, examples: Sequence[Example], *, chose_weights: bool) -> Self:
        task, targets = copy.copy(self), self.targets(examples)
        task.calibrations = {
            question: fit(logits[there, part], targets[there, place], chose_weights=chose_weights)
            for place, (question, part) in enumerate(self.parts.items())
            if int((there := targets[:, place] != NONE).sum()) >= FEWEST
        }
        return task

    def answers(self, logits: Tensor, inputs: Sequence[Input] = ()) -> list[Answer]:
        """`{"answers": {question: {"label", "probabilities"}}}` for each row. logits: (B, C)."""
        rows: list[Answer] = [{"answers": {}} for _ in range(len(logits))]
        tempered = self._tempered_logits(logits)
        for question, part in self.parts.items():
            names = [label.removeprefix(answer_to(question, "")) for label in self.labels[part]]
            chances = tempered[:, part].softmax(-1)
            for row, chosen, own in zip(rows, chances.argmax(-1).tolist(), chances.tolist(), strict=True):
                row["answers"][question] = {
                    "label": names[chosen],
                    "probabilities": dict(zip(names, own, strict=True)),
                }
        return rows

    @classmethod
    def prediction_of(cls, answer: Answer) -> Prediction:
        """Each answer as `question: class`."""
        return [answer_to(question, each["label"]) for question, each in answer["answers"].items()]

    def score(self, given: Prediction, example: Example) -> float:
        """The share of the example's answers that are given."""
        return sum(label in given for label in example.labels) / len(example.labels)

    @classmethod
    def line(cls, answer: Answer) -> str:
        """`topic: sport 0.93  urgent: no 0.81`."""
        answers = answer["answers"].items()
        return "  ".join(
            f"{answer_to(question, each['label'])} {each['probabilities'][each['label']]:.2f}"
            for question, each in answers
        )

    @classmethod
    def questions(cls, labels: Sequence[str]) -> tuple[str, ...]:
        return tuple(_parts(labels))

    @classmethod
    def decisions(cls, spec: TaskSpec) -> Mapping[str, Decision]:
        parts = _parts(spec["labels"]).items()
        return {
            question: Decision.among([label.removeprefix(answer_to(question, "")) for label in spec["labels"][part]])
            for question, part in parts
        }

    def spec(self) -> TaskSpec:
        fitted = {question: each.to_json() for question, each in self.calibrations.items()}
        more: TaskSpec = {"calibration": fitted} if fitted else {}
        own: TaskSpec = {
            "labels": list(self.labels),
            "pairs": self.pairs,
            "multi_label": True,
            "class_weights": self.class_weights,
        }
        return super().spec() | more | own

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        stored = stored_by_question(spec.get("calibration")).items()
        fitted = {question: Calibration.from_json(each) for question, each in stored}
        settings = stored_settings(spec, "labels", "multi_label", "calibration")
        return cls(spec["labels"], tokenizer, **settings, calibrations=fitted)


def _parts(labels: Sequence[str]) -> dict[str, slice]:
    """The outputs of each question. Raises DataError if they are not two or more, one after another."""
    questions = [question_in(label) for label in labels]
    parts = {each: slice(questions.index(each), questions.index(each) + questions.count(each)) for each in questions}
    for question, part in parts.items():
        if not question or part.stop - part.start < 2 or set(questions[part]) != {question}:
            raise DataError(
                f"the answers are {quote_all(labels, 80)}: expected `question: class`, and two classes or more of a "
                "question after one another"
            )
    if len(set(labels)) < len(labels) or not parts:
        raise DataError(f"the answers are {quote_all(labels, 80)}: expected different ones")
    return parts


def _ordered_classes(dataset: Dataset) -> tuple[str, ...]:
    """The classes of a data set, questions as the recipe names them and numbers by size."""
    found, names = _parts(dataset.labels), dataset.columns.get("label", "")
    classes = by_column(dict.fromkeys(dataset.labels, 1), found)
    asked = sorted(found, key=lambda question: (names.find(question), -len(question)))
    return tuple(answer_to(question, each) for question in asked for each in in_order(classes[question]))


def _count_answered(targets: Tensor) -> Tensor:
    """How many questions each example answers, at least 1: (B,)."""
    return (targets != NONE).sum(1).clamp(min=1)
