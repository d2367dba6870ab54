"""What an example is, and the examples of a data set in their splits. Loads no numpy and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its class; with `multi_label` a tuple of any number of classes, sorted, none twice."""

    text: str
    label: str | tuple[str, ...]

    @property
    def input(self) -> str:
        return self.text

    @property
    def output(self) -> str | tuple[str, ...]:
        return self.label

    @property
    def labels(self) -> tuple[str, ...]:
        """Its classes, one or many."""
        return self.label if isinstance(self.label, tuple) else (self.label,)


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and the text that should come of it."""

    source: str
    target: str

    @property
    def input(self) -> str:
        return self.source

    @property
    def output(self) -> str:
        return self.target


Example = Labelled | Pair


@dataclass(frozen=True)
class Dataset:
    """Examples of one task in three splits, and all that was decided on the way to them."""

    train: Sequence[Example]  # shuffled with the seed
    validation: Sequence[Example]  # may be empty
    test: Sequence[Example]
    kind: str  # of the task
    labels: tuple[str, ...]  # every class of the training table, in order; empty where outputs are texts
    columns: dict[str, str]  # role -> column
    notes: tuple[str, ...]  # guesses, drops, duplicates: a sentence each, to be shown
    duplicates: int  # test examples whose input is a training example's too
    digest: str  # "sha256:..." of the examples in their splits and order


def texts_of(examples: Sequence[Example]) -> list[str]:
    """The inputs of some examples of either kind."""
    return [example.input for example in examples]
