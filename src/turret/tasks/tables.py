"""From a source of data to examples: one call, `read`. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from turret.tasks.task import Example, Kind


class DataLike(Protocol):
    """A recipe's `[data]`, or anything with its fields."""

    source: str
    text: str | None
    label: str | None
    document: str | None
    summary: str | None
    prompt: str | None
    completion: str | None
    train: int | float | str | None
    validation: int | float | str | None
    test: int | float | str | None


@dataclass(frozen=True)
class Dataset:
    """Examples of one kind in three splits, and all that was decided on the way to them."""

    train: Sequence[Example]  # shuffled with the seed
    validation: Sequence[Example]  # may be empty
    test: Sequence[Example]
    kind: Kind
    labels: tuple[str, ...]  # classify: every class of the training table, sorted; else empty
    columns: dict[str, str]  # role -> column
    notes: tuple[str, ...]  # guesses, drops, duplicates: a sentence each, to be shown
    duplicates: int  # test examples whose input is a training example's too
    digest: str  # "sha256:..." of the examples in their splits and order


def read(data: DataLike, kind: Kind | None = None, seed: int = 42, *, multi_label: bool = False) -> Dataset:
    """Read the source, find the columns, choose the splits with the seed, and say in `notes` what was guessed."""
    raise NotImplementedError
