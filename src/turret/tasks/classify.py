"""Classification: one class for each text, or any number of classes (`multi_label`).

`TextInputs` and `HeadAnswers` are what all tasks with a head share.

Axes: B examples, C classes, T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from turret.data import Dataset, Example, Input, Labelled, Schema, TextPair
from turret.data.columns import LABELLED
from turret.errors import DataError, quote, quote_all
from turret.json_types import JsonObject
from turret.tasks.calibration import Calibration, Confidences, fit, label_sets, temperature_of
from turret.tasks.shapes import Answer, HeadConfig, Metrics, TaskSpec
from turret.tasks.task import (
    SIDES,
    Decision,
    Encoded,
    Measure,
    Mistake,
    Prediction,
    RequestKind,
    Task,
    TaskSettings,
    register,
)
from turret.tasks.tokens import Tokens
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from turret.families.family import HeadKind
    from turret.families.family import Kind as FamilyKind

TEXTS = ("text", "sentence", "review", "content", "comment", "tweet", "message")  # column names of inputs
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "topic")  # column names of classes
LOSS = Measure("loss", "the mean of minus the logarithm of the right answer's probability; 0 is perfect", "nats")
ECE = Measure("calibration error", "ECE: the mean distance of a probability from the share that is right")
RATIO = "train.head_lr_ratio"  # a setting of tasks with a head
CLASSES = (RATIO, "data.separator", "data.normalize_labels")  # settings of tasks with classes
THRESHOLD = 0.5  # multi-label: a class is predicted from this probability on


# --- what tasks with a head share -------------------------------------------------------------------------------------


class TextInputs:
    """Encodes texts, or pairs of texts. A row that is too long is cut; special tokens and `prefix_text` never are.

    Args:
        kind: of the task, for errors.
        max_tokens: of a row, special tokens included.
        prefix_text: in front of every (first) text.
        pairs: whether a row has two texts.

    Raises:
        DataError: `max_tokens` leaves no room for a text.
    """

    def __init__(self, kind: str, tokenizer: Tokenizer, max_tokens: int, prefix_text: str, *, pairs: bool) -> None:
        self.kind, self.max_tokens, self.prefix_text, self.pairs = kind, max_tokens, prefix_text, pairs
        self.tokenizer, self._tokens = tokenizer, Tokens(tokenizer)
        around = self._tokens.around_pair if pairs else None
        self._before, self._between, self._after = around or (self._tokens.before, [], self._tokens.after)
        self._prefix = self._tokens.plain([prefix_text])[0] if prefix_text else []
        special = len(self._before) + len(self._between) + len(self._after) + len(self._prefix)
        self.room = max_tokens - special  # tokens of a text, without special tokens and `prefix_text`
        needed = special + 1 + pairs
        if max_tokens < needed:
            raise DataError(
                f"task.max_tokens = {max_tokens} leaves no room for the text: the special tokens and prefix_text "
                f"take {special}, so set it to {needed} or more"
            )

    def encode(self, inputs: Sequence[Input]) -> list[Encoded]:
        """The tokens of each input: at most `max_tokens`, at least one. Raises DataError for one of another kind."""
        return self._two(self._checked_pairs(inputs)) if self.pairs else self._one(self.texts(inputs))

    def texts(self, inputs: Sequence[Input]) -> list[str]:
        """The inputs, each of which is one text. Raises DataError for another."""
        texts = [each for each in inputs if isinstance(each, str)]
        if len(texts) < len(inputs):
            two = any(isinstance(each, TextPair) for each in inputs)
            given = "two texts were given" if two else "a conversation is asked of a task that generates"
            raise DataError(f"{given}, and this one is {self.kind}: give one text")
        return texts

    def ids_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a whole text, and the characters of each, without `prefix_text`."""
        return self._tokens.ids_with_offsets(text)

    def row(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """Tokens of a text with the special tokens and `prefix_text` around them, and the place of the first."""
        before = [*self._before, *self._prefix]
        return [*before, *ids, *self._after] or [self._tokens.filler], len(before)

    def _one(self, texts: Sequence[str]) -> list[Encoded]:
        """The first tokens of each text."""
        import torch

        room = self.room + len(self._prefix)
        encoded = []
        for ids in self._tokens.plain([self.prefix_text + text for text in texts], most=room):
            row = [*self._before, *ids[:room], *self._after] or [self._tokens.filler]
            encoded.append(Encoded(torch.tensor(row, dtype=torch.long), cut=len(ids) > room))
        return encoded

    def _two(self, pairs: Sequence[TextPair]) -> list[Encoded]:
        """Both texts of each pair; the longer one loses its end first, as transformers' `longest_first`."""
        import torch

        own = len(self._prefix)
        room = self.room + own
        firsts = self._tokens.plain([self.prefix_text + pair.text for pair in pairs], most=room)
        seconds = self._tokens.plain([pair.text_pair for pair in pairs], most=room)
        encoded = []
        for first, second in zip(firsts, seconds, strict=True):
            kept = _kept_tokens(len(first) - own, len(second), self.room)
            kept = kept[0] + own, kept[1]
            start = [*self._before, *first[: kept[0]], *self._between]
            row = [*start, *second[: kept[1]], *self._after] or [self._tokens.filler]
            cut = kept != (len(first), len(second))
            ids = torch.tensor(row, dtype=torch.long)
            if self._tokens.segments:
                ids = torch.stack([ids, (torch.arange(len(row)) >= len(start)).long()], dim=1)
            encoded.append(Encoded(ids, cut=cut))
        return encoded

    def _checked_pairs(self, inputs: Sequence[Input]) -> list[TextPair]:
        pairs = [each for each in inputs if isinstance(each, TextPair)]
        if len(pairs) < len(inputs):
            raise DataError(f'this {self.kind} reads two texts, and one was given: give {{"text": …, "text_pair": …}}')
        return pairs


class HeadAnswers(Task, Protocol):
    """What is usual for a task that reads texts and is answered by a head."""

    head: ClassVar[HeadKind] = "classify"
    request: ClassVar[RequestKind] = "classify"
    solved: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-classification"
    peft_task: ClassVar[str | None] = "SEQ_CLS"
    measures: ClassVar[Mapping[str, Measure]] = {"loss": LOSS}
    errors: ClassVar[str] = "the worst answers"
    sides: ClassVar[tuple[str, str]] = ("right is", "answered")
    settings: ClassVar[tuple[str, ...]] = (RATIO,)
    inputs: TextInputs

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        return "print(logits.tolist())"

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int | None:
        return len(labels) or None

    @classmethod
    def labels_of_outputs(cls, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(names)

    @classmethod
    def from_words(cls, spec: TaskSpec, texts: Sequence[str]) -> Sequence[Input]:
        if not spec.get("pairs"):
            return texts
        if len(texts) % 2:
            raise DataError(
                f"this version reads two texts together, given {len(texts)}: give the second after the first"
            )
        return [TextPair(*texts[place : place + 2]) for place in range(0, len(texts), 2)]

    @property
    def pairs(self) -> bool:
        return self.inputs.pairs

    @property
    def max_tokens(self) -> int:
        return self.inputs.max_tokens

    @property
    def reads_like(self) -> Hashable:
        return self.inputs.max_tokens, self.inputs.prefix_text, self.inputs.pairs

    def spec(self) -> TaskSpec:
        """What every such task stores; most add their own to it."""
        calibration: TaskSpec = {} if self.calibration is None else {"calibration": self.calibration.to_json()}
        return calibration | {
            "kind": self.kind,
            "max_tokens": self.inputs.max_tokens,
            "prefix_text": self.inputs.prefix_text,
        }

    def with_calibration(self, calibration: Calibration) -> Self:
        task = copy.copy(self)
        task.calibration = calibration
        return task

    def encode_sources(self, inputs: Sequence[Input]) -> list[Encoded]:
        return self.inputs.encode(inputs)

    def encode_examples(self, examples: Sequence[Example]) -> list[tuple[Encoded, Encoded | None]]:
        return [(source, None) for source in self.encode_sources([example.asked for example in examples])]

    def metrics(self, logits: Tensor, targets: Tensor) -> Metrics:
        """The metrics of a data set by name, `loss` among them. logits: (B, num_labels)."""

    def judge(self, logits: Tensor, examples: Sequence[Example]) -> tuple[Metrics, list[Answer]]:
        answers = self.answers(logits, [example.asked for example in examples])
        return self.metrics(logits, self.targets(examples)), answers

    def classifier_of(self, decision: str, logits: Tensor) -> tuple[Task, Tensor]:
        raise DataError("a question needs probabilities of labels, and this task gives none")

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inputs.tokenizer

    def label_sets(self, logits: Tensor, coverage: float) -> list[list[str]]:
        raise DataError("coverage needs probabilities of labels, and this task gives none: leave it out")

    @classmethod
    @abstractmethod
    def prediction_of(cls, answer: Answer) -> Prediction: ...

    @abstractmethod
    def score(self, given: Prediction, example: Example) -> float: ...

    @classmethod
    def certainty(cls, answer: Answer) -> tuple[float, float]:
        raise DataError("this task gives no probabilities, so no answer is surer than another")


def stored_settings(spec: TaskSpec, *other: str) -> JsonObject:
    """The arguments that a stored task gives its class: all keys but `kind` and some others, its calibration read."""
    settings: JsonObject = {key: value for key, value in spec.items() if key not in ("kind", *other)}
    if "calibration" in settings:
        settings["calibration"] = Calibration.from_json(settings["calibration"])
    return settings


def output_names(names: Sequence[str]) -> HeadConfig:
    """The entries of transformers' configuration that name the outputs of a head."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _kept_tokens(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts fit: the longer one is cut, or both to equal lengths."""
    if first + second <= room:
        return first, second
    short, half = min(first, second), room // 2
    if short <= half:
        return (short, room - short) if first <= second else (room - short, short)
    return (half, room - half) if first <= second else (room - half, half)


# --- classify ---------------------------------------------------------------------------------------------------------


@register
class Classify(HeadAnswers):
    """A classifier's labels, in the order of the logits, and how it encodes a text."""

    kind: ClassVar[str] = "classify"
    ranks_labels: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True
    metric: ClassVar[str] = "accuracy"
    metric_label: ClassVar[str] = "accuracy"
    right_or_wrong: ClassVar[bool] = True
    baselines: ClassVar[tuple[str, ...]] = ("linear",)
    measures: ClassVar[Mapping[str, Measure]] = {
        "accuracy": Measure("accuracy", "the share of examples that are answered right", share=True),
        "micro_f1": Measure("micro F1", "F1 over all decisions, so that a common label counts more", share=True),
        "macro_f1": Measure("macro F1", "the mean of the F1 of all classes; each class counts the same", share=True),
        "loss": LOSS,
        "ece": ECE,
    }
    errors: ClassVar[str] = "the most confident wrong answers"
    settings: ClassVar[tuple[str, ...]] = (*CLASSES, "task.multi_label", "task.class_weights")

    def __init__(
        self,
        labels: Sequence[str],
        tokenizer: Tokenizer,
        max_tokens: int = 256,
        *,
        multi_label: bool = False,
        class_weights: Mapping[str, float] | None = None,
        prefix_text: str = "",
        calibration: Calibration | None = None,
        pairs: bool = False,
    ) -> None:
        if len(set(labels)) != len(labels) or len(labels) < (1 if multi_label else 2):
            raise DataError(f"classes must be different and at least {1 if multi_label else 2}, given {list(labels)}")
        unknown = sorted(set(class_weights or {}) - set(labels))
        if unknown:
            raise DataError(
                f"task.class_weights names {quote(unknown[0])}, which is not a class: the classes are "
                f"{quote_all(labels)}"
            )
        self.labels = tuple(labels)
        self.multi_label = multi_label
        self.calibration = calibration
        self.class_weights = None if class_weights is None else {name: float(w) for name, w in class_weights.items()}
        self._index = {label: i for i, label in enumerate(self.labels)}
        self.inputs = TextInputs(self.kind, tokenizer, max_tokens, prefix_text, pairs=pairs)

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        return Schema(
            cls.kind,
            {LABELLED: [(text, label) for text in TEXTS for label in LABELS]},
            TEXTS,
            lambda row: Labelled(row.asked_text(), row.label("label", many=multi_label)),
            classes=True,
            many=multi_label,
        )

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        weights = settings.class_weights
        if weights == "balanced":
            weights = balanced_weights(dataset.labels, dataset.train, multi_label=settings.multi_label)
        return cls(
            dataset.labels,
            tokenizer,
            settings.max_tokens,
            multi_label=settings.multi_label,
            class_weights=weights,
            prefix_text=settings.prefix_text,
            pairs="text_pair" in dataset.columns,
        )

    @classmethod
    def head_config(cls, spec: TaskSpec) -> HeadConfig:
        names = output_names(spec["labels"])
        return names | ({"problem_type": "multi_label_classification"} if spec.get("multi_label") else {})

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        if not spec.get("labels"):
            return super().print_line(spec)
        if spec.get("multi_label"):
            return "print([label for label, chance in zip(labels, logits.sigmoid().tolist()) if chance >= 0.5])"
        return "print(labels[int(logits.argmax())], float(logits.softmax(-1).max()))"

    @property
    def instruction(self) -> str:
        return f"Classify the following text as {', '.join(self.labels)}."

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """Class numbers (B,) int64. With `multi_label`, ones and zeros (B, C) float32."""
        import torch

        try:
            if not self.multi_label:
                return torch.tensor([self._index[str(example.output)] for example in examples], dtype=torch.long)
            many = torch.zeros(len(examples), len(self.labels))
            for row, example in enumerate(examples):
                for label in example.labels:
                    many[row, self._index[label]] = 1.0
            return many
        except KeyError as error:
            raise DataError(
                f"label {quote(error.args[0])} is unknown to this classifier: it knows {quote_all(self.labels)}"
            ) from None

    # --- logits to numbers and names -------------------------------------------------------------------------------

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over examples, so that the losses of micro-batches add up: a scalar.

        One class: `mean_b w[y_b] * cross_entropy_b`. "balanced" weights have mean 1 over the training examples.
        `multi_label`: `mean_b mean_c` of the binary cross-entropy, its positive term times w[c].

        Args:
            logits: (B, C).
            targets: (B,) int64, or (B, C) float32.
        """
        import torch.nn.functional as F

        logits = logits.float()
        weight = self._weight(logits.device)
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, targets.float(), pos_weight=weight)
        if weight is None:
            return F.cross_entropy(logits, targets)
        return (F.cross_entropy(logits, targets, reduction="none") * weight[targets]).mean()  # (B,) -> ()

    def guessing_loss(self, examples: Sequence[Example]) -> float:
        """The loss of the best constant answer: the entropy of the classes' shares, with the weights of the loss.

        One class: a_c = share_c w_c, loss = sum_c a_c log(sum(a) / a_c). `multi_label`: the mean over classes of the
        same for yes and no, where the share of yes is multiplied by w[c].
        """
        import torch

        targets = self.targets(examples)
        weight = self._weight(targets.device)
        if self.multi_label:
            yes = targets.mean(0)  # (C,)
            parts = torch.stack([yes if weight is None else yes * weight, 1 - yes])  # (2, C)
            return float(constant_loss(parts).mean())
        shares = torch.bincount(targets, minlength=len(self.labels)) / len(targets)  # (C,)
        return float(constant_loss(shares if weight is None else shares * weight))

    def _weight(self, device: torch.device) -> Tensor | None:
        import torch

        if self.class_weights is None:
            return None
        return torch.tensor([self.class_weights.get(label, 1.0) for label in self.labels], device=device)  # (C,)

    def class_scores(self, logits: Tensor) -> Tensor:
        """What the probabilities of the labels are computed from: (B, C). logits: as the head gives them."""
        return logits

    def chosen_classes(self, logits: Tensor) -> list[int]:
        """The number of the answered class of each row."""
        return logits.argmax(-1).tolist()

    def metrics(self, logits: Tensor, targets: Tensor) -> Metrics:
        """accuracy, macro_f1, loss, ece and a report for each class. loss and ece are of the answers' probabilities.

        Args:
            logits: (B, C).
        """
        from turret.tasks import metrics

        loss = float(self.loss(logits / temperature_of(self.calibration), targets))
        if self.multi_label:
            given = (logits.float().sigmoid() >= THRESHOLD).long()  # (B, C)
            found = metrics.many_classes(given.tolist(), targets.long().tolist(), self.labels, loss)
        else:
            found = metrics.one_class(self.chosen_classes(logits), targets.tolist(), self.labels, loss)
        return found | {"ece": self._sure(logits, targets).error}

    def confidences(self, logits: Tensor, examples: Sequence[Example]) -> dict[str, Confidences]:
        """Of the answered class; with `multi_label` of every label of every text."""
        return {"": self._sure(logits, self.targets(examples))}

    def _sure(self, logits: Tensor, targets: Tensor) -> Confidences:
        chances = self._probabilities(logits), self._probabilities(logits, 1.0)
        if self.multi_label:
            right = targets.flatten() > 0
            sure, raw = (each.flatten() for each in chances)
        else:
            chosen = targets.new_tensor(self.chosen_classes(logits))
            right = chosen == targets
            sure, raw = (each.gather(1, chosen[:, None].cpu())[:, 0] for each in chances)
        return Confidences(sure.tolist(), raw.tolist(), right.tolist(), self.calibration)

    def classifier_of(self, decision: str, logits: Tensor) -> tuple[Task, Tensor]:
        """Itself; with `multi_label` one of a label against none: softmax((0, z) / T) is sigmoid(z / T)."""
        import torch

        if not self.multi_label:
            return self, logits
        z = logits[:, self.labels.index(decision)]  # (B,)
        own = Classify(SIDES, self.tokenizer, self.max_tokens, calibration=self.calibration)
        return own, torch.stack([torch.zeros_like(z), z], dim=1)  # (B, 2)

    def calibrated(self, logits: Tensor, examples: Sequence[Example], *, chose_weights: bool) -> Self:
        scores, targets = self.class_scores(logits), self.targets(examples)
        return self.with_calibration(fit(scores, targets, multi_label=self.multi_label, chose_weights=chose_weights))

    def label_sets(self, logits: Tensor, coverage: float) -> list[list[str]]:
        if self.calibration is None:
            raise DataError(f"coverage {coverage:g} needs a calibration, and this classifier has none: train it again")
        predicted = [_label_list(answer["label"]) for answer in self.answers(logits)]
        threshold = self.calibration.threshold(coverage)
        return label_sets(self.class_scores(logits), self.labels, predicted, threshold, multi_label=self.multi_label)

    def _probabilities(self, logits: Tensor, temperature: float | None = None) -> Tensor:
        """(B, C) float64. temperature: None: the calibration's."""
        if temperature is None:
            temperature = 1.0 if self.calibration is None else self.calibration.temperature
        logits = self.class_scores(logits).detach().double() / temperature
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def answers(self, logits: Tensor, inputs: Sequence[Input] = ()) -> list[Answer]:
        """`{"label", "probabilities"}` for each row. With `multi_label` the label is a list. logits: (B, C)."""
        rows = [dict(zip(self.labels, row, strict=True)) for row in self._probabilities(logits).tolist()]
        if self.multi_label:
            return [{"label": [k for k, p in row.items() if p >= THRESHOLD], "probabilities": row} for row in rows]
        chosen = self.chosen_classes(logits)
        return [{"label": self.labels[i], "probabilities": row} for i, row in zip(chosen, rows, strict=True)]

    @classmethod
    def decisions(cls, spec: TaskSpec) -> Mapping[str, Decision]:
        """The class; with `multi_label` a predicate for each label, by its name."""
        if spec.get("multi_label"):
            return {str(label): Decision.among(SIDES) for label in spec["labels"]}
        return {"": Decision.among(spec["labels"])}

    @classmethod
    def prediction_of(cls, answer: Answer) -> Prediction:
        return answer["label"]

    def score(self, given: Prediction, example: Example) -> float:
        right = example.output
        return float(sorted(given) == sorted(right) if isinstance(given, list) else given == right)

    def worst(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Mistake]:
        """The wrong answers, the most confident first."""
        found = []
        for each in super().worst(examples, answers):
            sure = _surest(answers[each.row]["probabilities"], each.given, each.right)
            found.append(dataclasses.replace(each, confidence=sure, error=f"{sure:.2f}"))
        return sorted(found, key=lambda each: -(each.confidence or 0.0))

    @classmethod
    def certainty(cls, answer: Answer) -> tuple[float, float]:
        """The difference of the two highest probabilities, and that of the answer. With `multi_label`, of the label
        that is nearest to its threshold.
        """
        label, chances = answer["label"], answer["probabilities"]
        if isinstance(label, list):
            surer = min(max(each, 1 - each) for each in chances.values())
            return 2 * surer - 1, surer
        first, second = sorted(chances.values(), reverse=True)[:2]
        return first - second, float(chances[label])

    @classmethod
    def decision(cls, answer: Answer) -> tuple[str, float] | None:
        label = answer["label"]
        return None if isinstance(label, list) else (label, float(answer["probabilities"][label]))

    @classmethod
    def line(cls, answer: Answer) -> str:
        """The labels with their probabilities."""
        probabilities = answer["probabilities"]
        return "  ".join(f"{label} {probabilities[label]:.2f}" for label in _label_list(answer["label"])) or "none"

    # --- stored with the adapter -----------------------------------------------------------------------------------

    def spec(self) -> TaskSpec:
        pairs: TaskSpec = {"pairs": True} if self.pairs else {}
        own: TaskSpec = {
            "labels": list(self.labels),
            "multi_label": self.multi_label,
            "class_weights": self.class_weights,
        }
        return super().spec() | pairs | own

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        return cls(spec["labels"], tokenizer, **stored_settings(spec, "labels"))


def _surest(probabilities: Mapping[str, float], given: Prediction, right: Prediction) -> float:
    """The probability of the answer; of several labels, that of the most confident wrong decision."""
    if isinstance(given, str):
        return float(probabilities[given])
    wrong = [float(probabilities[label]) for label in given if label not in right]
    return max([*wrong, *(1 - float(probabilities[label]) for label in right if label not in given)])


def _label_list(label: Prediction) -> list[str]:
    return label if isinstance(label, list) else [label]


def balanced_weights(labels: Sequence[str], examples: Sequence[Example], *, multi_label: bool) -> dict[str, float]:
    """`n / (C n_c)` for each class, 1 for a class without examples. With `multi_label`, `(n - n_c) / n_c`."""
    counts = dict.fromkeys(labels, 0)
    for example in examples:
        for label in example.labels:
            counts[label] += 1
    n = len(examples)
    if multi_label:
        return {label: (n - k) / k if 0 < k < n else 1.0 for label, k in counts.items()}
    seen = sum(k > 0 for k in counts.values())
    return {label: n / (seen * k) if k else 1.0 for label, k in counts.items()}


def constant_loss(parts: Tensor) -> Tensor:
    """The loss of the best constant answer: sum_c a_c log(sum(a) / a_c) over the first axis, where 0 log 0 = 0."""
    import torch

    return torch.xlogy(parts, parts.sum(0)).sum(0) - torch.xlogy(parts, parts).sum(0)
