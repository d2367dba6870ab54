"""The types of an example and of a data set. Loads no numpy and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its class; with `multi_label` a sorted tuple of any number of different classes."""

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
    """A text and the text to generate from it, or several such texts."""

    source: str
    target: str
    others: tuple[str, ...] = ()  # further texts that are as good as the target

    @property
    def references(self) -> tuple[str, ...]:
        """All texts that the answer may be compared with."""
        return (self.target, *self.others)

    @property
    def input(self) -> str:
        return self.source

    @property
    def output(self) -> str:
        return self.target


Example = Labelled | Pair


@dataclass(frozen=True)
class Dataset:
    """Examples of one task in three splits, with the decisions that were made while reading them."""

    train: Sequence[Example]  # shuffled with the seed
    validation: Sequence[Example]  # may be empty
    test: Sequence[Example]
    kind: str  # of the task
    labels: tuple[str, ...]  # every class of the training table, in order; empty if outputs are texts
    columns: dict[str, str]  # role -> column
    notes: tuple[str, ...]  # guesses, left out rows, duplicates: a sentence each, for the user
    duplicates: int  # test examples whose input is also a training input
    digest: str  # "sha256:..." of the examples in their splits and order


def texts_of(examples: Sequence[Example]) -> list[str]:
    """The inputs of some examples of either kind."""
    return [example.input for example in examples]


def references_of(example: Example) -> tuple[str, ...]:
    """The texts that an answer to an example is compared with: several if its row has several."""
    return example.references if isinstance(example, Pair) else (str(example.output),)
