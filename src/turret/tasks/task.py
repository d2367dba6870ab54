"""The protocol of a task, and the table of tasks. A task is one file that imports torch inside its functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self, TypeAlias, TypeGuard, TypeVar, get_args

from turret.data import Dataset, Example, Input, Schema, TextPair
from turret.errors import AdapterError, DataError, quote
from turret.families.family import Pooling
from turret.json_types import JsonObject, mapping_of
from turret.tasks.calibration import Calibration, Confidences
from turret.tasks.shapes import Answer, Generation, HeadConfig, Metrics, TaskSpec
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import HeadKind
    from turret.families.family import Kind as FamilyKind

Gives = Literal["labels", "texts", "numbers", "spans", "vectors"]  # what answers are
RequestKind = Literal["classify", "generate", "embed"]  # what an engine answers with: a head, a text, or a vector
Prediction: TypeAlias = str | list[str]  # the part of an answer that is scored: a label, labels, a text, a number


@dataclass(frozen=True, slots=True)
class Encoded:
    """The token ids of a text, special tokens included."""

    ids: Tensor  # (T,) int64, T >= 1; or (T, 2) with the segment of each token
    cut: bool  # whether the text was longer than the limit
    earlier: Tensor | None = None  # (K,) int64, positions > 0 in `ids` of further tokens that the loss counts
    left_out: int = 0  # turns of a conversation that was longer than the limit
    whole: int | None = None  # tokens before the cut, if known
    rival: Tensor | None = None  # (R,) int64, of a target: another one that is worse
    read: Tensor | None = None  # (K,) int64, positions in `ids`: that a head for tokens reads, or the end of each text

    @classmethod
    def of(cls, ids: Sequence[int], *, cut: bool) -> Self:
        """The token ids of a list."""
        import torch

        return cls(torch.tensor(ids, dtype=torch.long), cut)


@dataclass(frozen=True)
class Embedding:
    """How a text becomes a vector, from the hidden states of the base's last layer. None: as usual.

    Args:
        pooling: The mean of all tokens, or the first or the last token.
        dimensions: Keep only the first numbers of the vector.
        normalize: Scale the vector to length 1, after it was cut; usual.

    Raises:
        DataError: For a value that does not exist.
    """

    pooling: Pooling | None = None
    dimensions: int | None = None
    normalize: bool | None = None

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in get_args(Pooling):
            raise DataError(f"pooling {self.pooling!r}: expected {', '.join(get_args(Pooling))}")
        if self.dimensions is not None and (not isinstance(self.dimensions, int) or self.dimensions < 1):
            raise DataError(f"dimensions = {self.dimensions!r}: expected a whole number of 1 or more")

    def over(self, usual: Embedding) -> Embedding:
        """The same, with what is None here as in another one."""
        return Embedding(
            self.pooling or usual.pooling,
            self.dimensions or usual.dimensions,
            usual.normalize if self.normalize is None else self.normalize,
        )

    def vectors(self, pooled: Tensor) -> Tensor:
        """e = h[:dimensions], divided by |e| if `normalize`: (..., D) -> (..., d)."""
        import torch
        import torch.nn.functional as F

        cut = pooled.to(torch.promote_types(pooled.dtype, torch.float32))[..., : self.dimensions]
        return cut if self.normalize is False else F.normalize(cut, dim=-1)


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric as a reader meets it.

    Args:
        name: in tables and on pages.
        says: what it measures, as a sentence without a full stop.
        unit: after a value, such as "nats".
        share: of 0 to 1, and shown in percent.
    """

    name: str
    says: str = ""
    unit: str = ""
    share: bool = False


QuestionType = Literal["predicate", "choice", "score"]
SIDES = ("no", "yes")  # of the decision for one label, where a text has several
FALSE, TRUE = ("no", "false", "0"), ("yes", "true", "1")  # labels of a predicate that need no explanation


@dataclass(frozen=True, slots=True)
class Decision:
    """A question that an adapter decides by the probabilities of labels.

    Args:
        labels: of a predicate false and true, of a score from the lowest to the highest.
    """

    type: QuestionType
    labels: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        """Whether the labels are levels, from the lowest to the highest."""
        return self.type == "score"

    @classmethod
    def among(cls, labels: Sequence[str]) -> Decision:
        """A predicate if the labels are yes and no, true and false, or 1 and 0; else a choice."""
        ordered = sorted(labels, key=lambda label: label.casefold() in TRUE)
        if len(ordered) == 2 and (ordered[0].casefold(), ordered[1].casefold()) in zip(FALSE, TRUE, strict=True):
            return cls("predicate", tuple(ordered))
        return cls("choice", tuple(labels))


def label_probabilities(answer: Answer, decision: str) -> Mapping[str, float]:
    """The probability of each label of one decision in an answer. decision: a key of `Task.decisions`.

    Raises:
        AdapterError: The answer has no such decision.
    """
    try:
        if "answers" in answer:
            return mapping_of(answer["answers"][decision]["probabilities"])
        found = mapping_of(answer["probabilities"])
        return dict(zip(SIDES, (1 - found[decision], found[decision]), strict=True)) if decision else found
    except KeyError:
        raise AdapterError(f"the answer decides no {quote(decision, 40)}: ask a version that does") from None


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, or one that is not what it should be.

    Args:
        row: the number of the example, from 0; of a table, the line (of a text file) or the number of its row.
        asked: what was asked.
        right: the label, the labels, the number or the reference.
        given: the answer in the same form.
        score: from 0 to 1.
        confidence: the probability of the answer; with several labels, that of the most confident wrong decision.
        error: how wrong it is, in the task's own words.
    """

    row: int
    asked: Input
    right: Prediction
    given: Prediction
    score: float
    confidence: float | None = None
    error: str = ""

    @property
    def text(self) -> str:
        """What was asked, as one text."""
        return str(self.asked)

    def as_json(self) -> JsonObject:
        """The fields; two texts are `text` and `text_pair`."""
        texts = {"text": self.text}
        if isinstance(self.asked, TextPair):
            texts = {"text": self.asked.text, "text_pair": self.asked.text_pair}
        return {key: value for key, value in vars(self).items() if key != "asked"} | texts


class TaskSettings(Protocol):
    """A recipe's `[task]`: see `turret.recipe.Task`."""

    kind: str | None
    max_tokens: int
    max_target_tokens: int | None
    prefix_text: str
    multi_label: bool
    class_weights: Literal["balanced"] | dict[str, float] | None
    levels: list[str] | None
    chat_template: bool
    loss: Literal["dpo", "orpo", "multiple_negatives", "cosent", "triplet"] | None
    beta: float | None
    reference: str | None
    pooling: Pooling | None
    normalize: bool | None
    dimensions: list[int] | None
    loss_on: Literal["assistant", "last"] | None
    num_beams: int
    max_new_tokens: int | None


class Task(Protocol):
    """What every task says of itself, for all who train, ask, judge and store its adapters.

    The class methods work before a base is loaded. An instance has labels and a tokenizer. What has a value or a body
    here is usual; `HeadAnswers` and `TextAnswers` add what is usual for their way of answering. A method that belongs
    to the other way than the task's own is not called.
    """

    kind: ClassVar[str]  # its name in a recipe
    request: ClassVar[RequestKind]  # the route that answers it
    generates: ClassVar[bool] = False  # whether its answers are texts that the base writes
    gives: ClassVar[Gives] = "labels"  # what its answers are
    solved: ClassVar[bool] = False  # whether a new head starts at the linear solution
    head: ClassVar[HeadKind]  # that its base is loaded with
    pipeline_tag: ClassVar[str]  # the Hub's name of it
    peft_task: ClassVar[str | None] = None  # PEFT's, if no base decides it
    metric: ClassVar[str]  # the number that `compare` judges: the mean of `score`
    rank_metric: ClassVar[str | None] = None  # if it is among the metrics, the score is this correlation of ranks
    metric_label: ClassVar[str]  # the metric's name in tables and reports
    measures: ClassVar[Mapping[str, Measure]]  # every metric that `metrics` gives, by its key
    errors: ClassVar[str]  # what `worst` lists, as a title
    texts: ClassVar[tuple[str, str]] = ("first text", "second text")  # where two texts are read together
    sides: ClassVar[tuple[str, str]]  # what stands before the right answer of a mistake, and before the given one
    right_or_wrong: ClassVar[bool] = False  # whether every score is 0 or 1
    yes_from: ClassVar[float | None] = None  # the number from which on an answer says yes, if only yes or no is judged
    reads_tokens: ClassVar[bool] = False  # whether its head reads the tokens of a text, also in several `windows`
    ranks_labels: ClassVar[bool] = False  # whether an answer has the probability of each label
    calibrates: ClassVar[bool] = False  # whether a temperature is fitted to the probabilities of its answers
    spans: ClassVar[Literal["row", "batch"]] = "row"  # whether its loss is a mean over rows, or compares a batch
    two_answers: ClassVar[bool] = False  # whether a row has a better and a worse answer, see `Preference`
    rate_ratio: ClassVar[float] = 1.0  # of its usual learning rate to the method's
    baselines: ClassVar[tuple[str, ...]] = ()  # of `compare`, that train nothing: linear, lead, nearest
    bare: ClassVar[bool] = False  # whether a base without an adapter answers it
    settings: ClassVar[tuple[str, ...]] = ()  # keys of a recipe that it reads and not every task does

    # --- class methods -----------------------------------------------------------------------------------------------

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        """Which columns the task reads and guesses, and how a row becomes an example."""

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        """The task of a recipe's `[task]` and a data set, on a base of that kind of family."""

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        """The task that `spec()` described."""

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        """Python for a card: a line that prints the answer in `logits` (C,), with `labels` if there are any."""

    @classmethod
    def peft_type(cls, *, encoder_decoder: bool | None) -> str | None:
        """PEFT's `task_type` on a base of that kind; None if its kind is not known and decides it."""
        return cls.peft_task

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int | None:
        """Outputs of the head for these labels; None if the base needs no new head."""
        return None

    @classmethod
    def labels_of_outputs(cls, names: Sequence[str]) -> tuple[str, ...]:
        """The labels of a head whose outputs have these names, in order. Raises DataError if the task has no such."""
        return ()

    @classmethod
    def head_config(cls, spec: TaskSpec) -> HeadConfig:
        """The head's keys in the configuration of a merged model, as transformers names them."""
        return {}

    @classmethod
    def prediction_of(cls, answer: Answer) -> Prediction:
        """The part of an answer that is scored: its label, its labels, its text or its number."""

    @classmethod
    def line(cls, answer: Answer) -> str:
        """An answer as one line on a screen."""

    @classmethod
    def from_words(cls, spec: TaskSpec, texts: Sequence[str]) -> Sequence[Input]:
        """What is asked by texts that follow one another on a command line. Raises DataError."""
        return texts

    @classmethod
    def questions(cls, labels: Sequence[str]) -> tuple[str, ...]:
        """The questions that an answer answers, each with columns of its own in a table; empty if there is only one."""
        return ()

    @classmethod
    def decisions(cls, spec: TaskSpec) -> Mapping[str, Decision]:
        """What an answer decides by probabilities of labels, by name; the only one has an empty name. May be empty."""
        return {}

    # --- an instance -------------------------------------------------------------------------------------------------

    labels: tuple[str, ...] = ()  # empty where answers are texts
    multi_label: bool = False
    embedding: Embedding | None = None  # how a text becomes a vector, if that is the answer
    pooling: Pooling | None = None  # which hidden states make that vector
    calibration: Calibration | None = None  # of all its probabilities, fitted on validation examples
    notes: tuple[str, ...] = ()  # decisions that a user should see
    max_target_tokens: int = 0  # of a text that it learns to write; 0 if it learns none
    max_new_tokens: int = 0  # of a text that it writes; 0 if it writes none

    @property
    def reads_like(self) -> Hashable:
        """Tasks for which it is equal give a text the same tokens; None: no other does."""

    if TYPE_CHECKING:  # attributes of some tasks, and properties of others

        @property
        def tokenizer(self) -> Tokenizer: ...
        @property
        def pairs(self) -> bool: ...  # whether two texts are read together
        @property
        def max_tokens(self) -> int: ...
        @property
        def instruction(self) -> str: ...  # the task in words; a prefix starts from them

    def spec(self) -> TaskSpec:
        """Everything that prediction needs, as JSON. `task_from_spec` makes an equal task from it."""

    def encode_sources(self, inputs: Sequence[Input]) -> list[Encoded]:
        """Inputs as tokens. Raises DataError for an input that the task does not read."""

    def pieces(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples to train on: a long one may become several."""
        return examples

    def encode_examples(self, examples: Sequence[Example]) -> list[tuple[Encoded, Encoded | None]]:
        """Inputs and targets as tokens; None where the target is not a text."""

    def score(self, given: Prediction, example: Example) -> float:
        """How well a prediction fits the example, from 0 to 1."""

    def scores(self, given: Sequence[Prediction], examples: Sequence[Example]) -> list[float]:
        """How well each prediction fits its example, where that may depend on the others too."""
        return [self.score(each, example) for each, example in zip(given, examples, strict=True)]

    def worst(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Mistake]:
        """What is wrong in these answers, the worst first: usually the answers with a score below 1."""
        found, every = [], [self.prediction_of(answer) for answer in answers]
        both = zip(examples, every, self.scores(every, examples), strict=True)
        for row, (example, given, score) in enumerate(both):
            if score < 1:
                error = f"{self.metric_label} {score:.2f}"
                found.append(Mistake(row, example.asked, right_of(example), given, score, error=error))
        return sorted(found, key=lambda each: each.score)

    def numbers(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[tuple[float, float]]:
        """The right number and the answered one of each example, for a plot; none if answers are no numbers."""
        return []

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over examples, or over target tokens if the task generates: a scalar."""

    def guessing_loss(self, examples: Sequence[Example]) -> float | None:
        """The lowest loss of an answer that ignores the input; None if the task defines none."""
        return None

    # --- a task that is answered by the outputs of one pass: of a head -----------------------------------------------

    def windows(self, inputs: Sequence[Input]) -> list[list[Encoded]]:
        """Inputs as tokens, where a long one may be read in several rows, one after another. Raises DataError."""
        return [[each] for each in self.encode_sources(inputs)]

    def calibrated(self, logits: Tensor, examples: Sequence[Example], *, chose_weights: bool) -> Self:
        """The same task with a calibration. logits: of validation examples, as for `answers`."""
        return self

    def confidences(self, logits: Tensor, examples: Sequence[Example]) -> dict[str, Confidences]:
        """How sure the answers are, by question; the question is "" if there is only one. Empty if none is sure."""
        return {}

    def classifier_of(self, decision: str, logits: Tensor) -> tuple[Task, Tensor]:
        """A classifier that decides one of `decisions` alone, and its logits. logits: as the head gives them."""
        raise _no_head(self)

    def label_sets(self, logits: Tensor, coverage: float) -> list[list[str]]:
        """The labels of each row that together have this coverage, the most probable first. Raises DataError."""
        raise _no_head(self)

    @classmethod
    def certainty(cls, answer: Answer) -> tuple[float, float]:
        """The margin of an answer, from 0 (as unsure as possible) to 1, and its probability. Raises DataError."""

    @classmethod
    def decision(cls, answer: Answer) -> tuple[str, float] | None:
        """The one label of an answer and its probability, which a promise is about; None for other answers."""
        return None

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """What `loss` takes for these examples: (B, ...), or of all tokens that are read (N,)."""
        raise _no_head(self)

    def linear_targets(self, examples: Sequence[Example]) -> Tensor:
        """What the baseline `linear` fits: class numbers, numbers (B,) float32, or ones and zeros for each output."""
        return self.targets(examples)

    def answers(self, logits: Tensor, inputs: Sequence[Input] = ()) -> list[Answer]:
        """One answer for each input. logits: (B, num_labels), or of all tokens that are read (N, num_labels)."""
        raise _no_head(self)

    def judge(self, logits: Tensor, examples: Sequence[Example]) -> tuple[Metrics, list[Answer]]:
        """The metrics of some examples by name, `loss` among them, and an answer for each. logits: as for `answers`."""
        raise _no_head(self)

    # --- a task that is answered by a text, which the base generates token by token ----------------------------------

    @property
    def generation(self) -> Generation:
        """The arguments of transformers' `generate()`; empty if it generates none."""
        return {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens."""
        raise TypeError(f"{type(self).__name__} writes no text")

    def judge_texts(
        self, texts: Sequence[str], references: Sequence[tuple[str, ...]], mean_loss: float | None
    ) -> Metrics:
        """The metrics of generated texts by name, each with its references. mean_loss: over target tokens, if known."""
        raise TypeError(f"{type(self).__name__} writes no text")


def _no_head(task: Task) -> TypeError:
    return TypeError(f"{type(task).__name__} is answered by a text, not by a head")


class ComparingTask(Task, Protocol):
    """A task whose rows have a better and a worse answer. Axes: B examples; the first of two answers is the better."""

    objective: Literal["dpo", "orpo"]
    reference: str | None  # the version that answers are compared with; None: the bare base

    def preference_loss(self, scores: Tensor, reference: Tensor | None, counts: Tensor, loss: Tensor | None) -> Tensor:
        """The mean over examples, of the log-probabilities of both answers (B, 2) and those of the reference."""

    def margins(self, scores: Tensor, reference: Tensor | None, counts: Tensor) -> Tensor:
        """How much more likely the better answer is (B,)."""

    def compare_margins(self, margins: Sequence[float], loss: float) -> tuple[Metrics, list[Answer]]:
        """The metrics of some margins, and an answer for each."""


def is_comparing(task: Task) -> TypeGuard[ComparingTask]:
    """Whether the task learns from two answers."""
    return task.two_answers


# --- the table -------------------------------------------------------------------------------------------------------

TASKS: dict[str, type[Task]] = {}  # by kind, in the order in which columns are matched
Registered = TypeVar("Registered", bound="type[Task]")


def register(task: Registered) -> Registered:
    """Add a task to the table: a decorator of its class."""
    TASKS[task.kind] = task
    return task


def task_kinds(form: Callable[[str], str] = str) -> str:
    """`classify, summarize or generate`."""
    *most, last = map(form, TASKS)
    return f"{', '.join(most)} or {last}"


def task_of(kind: str) -> type[Task]:
    """The task of that kind. Raises DataError, which lists the known kinds."""
    if kind not in TASKS:
        raise DataError(f"there is no task {quote(kind, 40)}: expected {task_kinds()}")
    return TASKS[kind]


def stored_task(spec: TaskSpec) -> type[Task]:
    """The task that a stored adapter's manifest names; `generate` if it names none, as PEFT's adapters do not."""
    return TASKS.get(str(spec.get("kind")), TASKS["generate"])


def task_measured_by(values: Metrics, kind: str | None = None) -> type[Task]:
    """The task that these metrics are of: the one of that kind, or else the first one that has all of them."""
    if kind in TASKS:
        return TASKS[kind]
    keys = [key for key, value in values.items() if isinstance(value, int | float)]

    def measures(task: type[Task]) -> bool:  # `main_score_64` is that of 64 dimensions
        return all(key in task.measures or key.rstrip("0123456789").rstrip("_") in task.measures for key in keys)

    return next(filter(measures, TASKS.values()), TASKS["generate"])


def main_metric(values: Metrics, kind: str | None = None) -> str | None:
    """The metric to show if there is room for one: the task's own, or else the loss; None if neither was measured."""
    return next((name for name in (task_measured_by(values, kind).metric, "loss") if name in values), None)


def measure_of(name: str, values: Metrics, kind: str | None = None) -> Measure:
    """How to show one of these metrics."""
    return task_measured_by(values, kind).measures.get(name) or Measure(name.replace("_", " "))


TOGETHER = 128  # examples whose loss is computed together in an evaluation, if it compares the examples of a batch


def shared_losses(task: Task, outputs: Sequence[Tensor], examples: Sequence[Example]) -> list[float]:
    """For each example the loss of its batch, of `TOGETHER` examples. outputs: of each example."""
    import torch

    losses: list[float] = []
    for start in range(0, len(examples), TOGETHER):
        part = examples[start : start + TOGETHER]
        found = float(task.loss(torch.cat(list(outputs[start : start + TOGETHER])), task.targets(part)))
        losses += [found] * len(part)
    return losses


def right_of(example: Example) -> Prediction:
    """The right answer, as a prediction is given."""
    return list(example.output) if isinstance(example.output, tuple) else example.output


def schemas(settings: TaskSettings) -> list[Schema]:
    """The schema of the task that a recipe's `[task]` names, or the schemas of all tasks if it names none."""
    kinds = TASKS.values() if settings.kind is None else [task_of(settings.kind)]
    return [task.schema(multi_label=settings.multi_label) for task in kinds]


def make_task(settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Task:
    """The task of a recipe's `[task]` and a data set, on a base of that kind of family."""
    return task_of(dataset.kind).make(settings, dataset, tokenizer, family_kind)


def task_from_spec(spec: TaskSpec, tokenizer: Tokenizer) -> Task:
    """The task that a stored adapter was trained for. Raises AdapterError for a manifest that does not describe one."""
    try:
        return TASKS[spec["kind"]].from_spec(spec, tokenizer)
    except (KeyError, TypeError) as error:
        raise AdapterError(
            f"the adapter's task cannot be read ({type(error).__name__}: {error}): store it again with this version"
        ) from None
