"""What every task answers, and the table of tasks. A task is one file: it imports torch inside its functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeGuard, TypeVar

from turret.data import Dataset, Example, Schema
from turret.errors import AdapterError, DataError, shown

if TYPE_CHECKING:
    from torch import Tensor

    from turret.json_types import JsonObject
    from turret.transformer import Tokenizer

RequestKind = Literal["classify", "generate"]  # what an engine is asked for: the answer of a head, or a text
FamilyKind = Literal["encoder", "encoder-decoder", "decoder"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids as the model sees them, special tokens included, and whether some of the text did not fit."""

    ids: Tensor  # (T,) int64, T >= 1
    cut: bool


class Task(Protocol):
    """One task. The class says what is known before a base is loaded, an instance has labels and a tokenizer.

    An instance is a `TextTask` if it generates, else a `HeadTask`.
    """

    kind: ClassVar[str]  # its name in a recipe
    request: ClassVar[RequestKind]  # the route that answers it, and the head that its base is loaded with
    generates: ClassVar[bool]  # whether an answer is written a token at a time
    pipeline_tag: ClassVar[str]  # the Hub's name of it
    metric: ClassVar[str]  # the number that `compare` judges: the mean of `score`
    metric_label: ClassVar[str]  # for reading
    right_or_wrong: ClassVar[bool]  # whether every score is 0 or 1

    # --- of the class ---

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        """The columns that it reads and guesses, and what an example is made of."""

    @classmethod
    def make(cls, settings: Any, dataset: Dataset, tokenizer: Any, family_kind: FamilyKind) -> Self:
        """The task of a recipe's `[task]` and a data set, on a base of that kind of family."""

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tokenizer: Any) -> Self:
        """The task that `spec` told of."""

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int | None:
        """Outputs of the head for these labels; None where the base brings its own head."""

    @classmethod
    def head_config(cls, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What the configuration of a merged model says of its head, in the words of transformers."""

    # --- answers: as JSON, as a line, and beside what was wanted ---

    @classmethod
    def judged(cls, answer: Mapping[str, Any]) -> Any:
        """What of an answer is compared: its label, its labels or its text."""

    @classmethod
    def score(cls, given: Any, example: Any) -> float:
        """How good what was given is for the example: 0 to 1."""

    @classmethod
    def line(cls, answer: Mapping[str, Any]) -> str:
        """An answer for a screen."""

    # --- of an instance ---

    @property
    def labels(self) -> tuple[str, ...]: ...  # empty where answers are texts
    @property
    def multi_label(self) -> bool: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def instruction(self) -> str: ...  # the task in words, which a prefix starts from

    def spec(self) -> dict[str, Any]:
        """All that prediction needs, as JSON: `task_from_spec` makes the same task of it."""

    def encode_sources(self, texts: Sequence[str]) -> list[Encoded]:
        """Inputs as tokens."""

    def encode_examples(self, examples: Sequence[Any]) -> list[tuple[Encoded, Encoded | None]]:
        """Inputs and targets as tokens; None where the target is not a text."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over examples, or over target tokens where it generates: a scalar."""

    def guessing_loss(self, examples: Sequence[Any]) -> float | None:
        """The least loss of an answer that does not look at the input, over some examples; None where nobody asks."""


class HeadTask(Task, Protocol):
    """A task that a head answers: logits (B, num_labels)."""

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """What the loss compares the logits with: (B,) or (B, num_labels)."""

    def metrics(self, logits: Tensor, targets: Tensor) -> JsonObject:
        """The scores of logits (B, num_labels), with the mean loss."""

    def answers(self, logits: Tensor) -> list[JsonObject]:
        """An answer per row: its label or labels, and their probabilities."""


class TextTask(Task, Protocol):
    """A task whose answer is a text, written a token at a time."""

    tokenizer: Tokenizer
    max_target_tokens: int

    @property
    def generation(self) -> JsonObject:
        """The arguments of transformers' `generate()`."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens."""

    def metrics(self, texts: Sequence[str], references: Sequence[str], mean_loss: float | None) -> JsonObject:
        """The scores of generated texts, with loss and perplexity where a mean loss is given."""


def has_head(task: Task) -> TypeGuard[HeadTask]:
    """Whether a head answers it, for the type checker too."""
    return not task.generates


def writes(task: Task) -> TypeGuard[TextTask]:
    """Whether it generates text, for the type checker too."""
    return task.generates


# --- the table -------------------------------------------------------------------------------------------------------

TASKS: dict[str, type[Task]] = {}  # by kind, in the order in which columns are matched
Registered = TypeVar("Registered", bound=type[Task])


def register(task: Registered) -> Registered:
    """Add a task to the table: a decorator of its class."""
    TASKS[task.kind] = task
    return task


def kinds(form: Callable[[str], str] = str) -> str:
    """`classify, summarize or generate`."""
    *most, last = map(form, TASKS)
    return f"{', '.join(most)} or {last}"


def task_of(kind: str) -> type[Task]:
    """The task of that kind; raises DataError."""
    if kind not in TASKS:
        raise DataError(f"there is no task {shown(kind, 40)}: expected {kinds()}")
    return TASKS[kind]


def stored_task(spec: Mapping[str, Any]) -> type[Task]:
    """The task that a stored adapter's manifest names; `generate` where it names none, as PEFT's own do not."""
    return TASKS.get(str(spec.get("kind")), TASKS["generate"])


def schemas(settings: Any) -> list[Schema]:
    """What the task of a recipe's `[task]` reads, or what every task reads where none is named."""
    kinds = TASKS.values() if settings.kind is None else [task_of(settings.kind)]
    return [task.schema(multi_label=settings.multi_label) for task in kinds]


def make_task(settings: Any, dataset: Any, tokenizer: Any, family_kind: FamilyKind) -> Task:
    """The task that `settings` (a recipe's `[task]`) and a `Dataset` describe, for a base of that kind of family."""
    return task_of(dataset.kind).make(settings, dataset, tokenizer, family_kind)


def task_from_spec(spec: Mapping[str, Any], tokenizer: Any) -> Any:
    """The task that a stored adapter was trained for."""
    try:
        return TASKS[spec["kind"]].from_spec(spec, tokenizer)
    except (KeyError, TypeError) as error:
        raise AdapterError(
            f"the adapter's task cannot be read ({type(error).__name__}: {error}): store it again with this version"
        ) from None
