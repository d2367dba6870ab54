"""What an example is, and what every task answers. Knows words only: no tables, no training, and loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["classify", "summarize", "generate"]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its class; with `multi_label` a tuple of any number of classes, sorted, none twice."""

    text: str
    label: str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and the text that should come of it."""

    source: str
    target: str


Example = Labelled | Pair


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids as the model sees them, special tokens included, and whether some of the text did not fit."""

    ids: Tensor  # (T,) int64, T >= 1
    cut: bool


class Task(Protocol):
    """What training, evaluation and prediction may ask of a task of any kind."""

    @property
    def kind(self) -> Kind: ...

    def spec(self) -> dict[str, Any]:
        """All that prediction needs, as JSON: `turret.tasks.make.task_from_spec` makes the same task of it."""
        ...

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over examples (classify) or target tokens (generate): a scalar."""
        ...

    def guessing_loss(self, examples: Sequence[Any]) -> float | None:
        """The least loss of an answer that does not look at the input, over some examples; None where nobody asks."""
        ...


def texts_of(examples: Sequence[Example]) -> list[str]:
    """The inputs of some examples of either kind."""
    return [example.text if isinstance(example, Labelled) else example.source for example in examples]
