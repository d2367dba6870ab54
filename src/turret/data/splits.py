"""Which rows make the training, validation and test examples, from their counts and a seed alone.

- a split that the recipe names is that split, whole
- a number or a fraction is taken from the split of that name where the source has one, else from the training table
- nothing said about test: the test split, else a fifth of the training table, at most `MOST_TEST`
- nothing said about validation: the validation split, else none; nothing said about train: all that is left
- rows are shuffled with the seed; test rows are taken first, then validation, then training rows, so that the test
  examples stay the same when more or fewer training examples are asked for. There is no stratifying.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from turret.data.files import canonical_split
from turret.errors import DataError, listed, shown

Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")
MOST_TEST = 1000
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Sources:
    """Which split of the source each role reads; the training table where the role is carved off it."""

    split: dict[Role, str]  # role -> name of the split; a role without examples is not here
    carved: tuple[Role, ...]  # roles that share the training table


@dataclass(frozen=True)
class Chosen:
    """Row numbers among the usable rows of a split, in the order of the examples."""

    rows: dict[Role, npt.NDArray[np.int64]]
    notes: tuple[str, ...]


def find_sources(data: Any, splits: Sequence[str]) -> Sources:
    """Decide from names alone which split serves which role."""
    wanted = {role: getattr(data, role) for role in ROLES}
    named: dict[Role, str] = {role: _lookup(role, w, splits) for role, w in wanted.items() if isinstance(w, str)}
    twice = [role for role in named if list(named.values()).count(named[role]) > 1]
    if twice:
        raise DataError(f"{' and '.join(twice)} are both the split {shown(named[twice[0]])}: name different splits")
    free = {canonical_split(split): split for split in reversed(splits) if split not in named.values()}
    train = named.get("train") or free.get("train") or (splits[0] if len(splits) == 1 and not named else None)
    if train is None:
        raise DataError(f"there is no training split: the splits are {listed(splits)}, so name one in data.train")
    found: dict[Role, str] = {"train": train}
    carved: list[Role] = []
    for role in ("test", "validation"):
        split = named.get(role) or free.get(role)
        if split is not None and split != train:
            found[role] = split
        elif role == "test" or wanted[role] is not None:
            found[role] = train
            carved.append(role)
    return Sources(found, tuple(carved))


def test_split(data: Any, splits: Sequence[str]) -> str:
    """The split to evaluate on: the one that is named, else the test split, else the only one, else validation."""
    if isinstance(data.test, str):
        return _lookup("test", data.test, splits)
    free = {canonical_split(split): split for split in reversed(splits)}
    for split in ("test", "validation"):
        if split in free or len(splits) == 1:
            return free.get(split, splits[0])
    raise DataError(f"which split to evaluate on? The splits are {listed(splits)}: name one in data.test")


def _lookup(role: Role, name: str, splits: Sequence[str]) -> str:
    if name in splits and name:
        return name
    for split in splits:
        if split and canonical_split(split) == canonical_split(name):
            return split
    there = f"the splits are {listed(splits)}" if any(splits) else "the source is one table without splits"
    raise DataError(f"data.{role} = {shown(name)}, but {there}: give a number, a fraction, or one of the splits")


def choose(data: Any, sources: Sources, counts: Mapping[str, int], seed: int) -> Chosen:
    """Take the rows; `counts` are the usable rows of each split."""
    notes: list[str] = []
    rows: dict[Role, npt.NDArray[np.int64]] = {}
    train = sources.split["train"]
    order = shuffled(counts[train], seed)
    start = 0
    for role in ("test", "validation"):
        if role not in sources.split:
            rows[role] = order[:0]
        elif role in sources.carved:
            size = _carved_size(role, getattr(data, role), counts[train], notes)
            rows[role] = order[start : start + size]
            start += size
        else:
            split = sources.split[role]
            size = taken(role, getattr(data, role), counts[split], counts[split], notes)
            rows[role] = shuffled(counts[split], seed)[:size]
    left = counts[train] - start
    if left < 1:
        raise DataError(
            f"{counts[train]} usable rows and {start} of them held out leave none to train on: "
            "give more rows, or lower data.test and data.validation"
        )
    rows["train"] = order[start : start + taken("train", data.train, counts[train], left, notes)]
    return Chosen({role: rows[role] for role in ROLES}, tuple(notes))


def shuffled(count: int, seed: int) -> npt.NDArray[np.int64]:
    """A permutation that stays the same for good."""
    # RandomState: its stream is frozen for good, a Generator's may change with numpy, and so would the test set.
    return np.random.RandomState(seed).permutation(count)


def _carved_size(role: Role, wanted: Any, count: int, notes: list[str]) -> int:
    if wanted is None:
        size = min(MOST_TEST, max(1, round(TEST_SHARE * count)))
        notes.append(f"no test split and none asked for: {size} of {count} rows are held out for the test")
        return size
    return max(1, round(wanted * count)) if isinstance(wanted, float) else int(wanted)


def taken(role: Role, wanted: Any, whole: int, left: int, notes: list[str]) -> int:
    """How many of the rows that are left; fewer than asked for are taken with a note."""
    if wanted is None or isinstance(wanted, str):
        return left
    size = max(1, round(wanted * whole)) if isinstance(wanted, float) else int(wanted)
    if size > left:
        notes.append(f"{role}: {size} examples asked for, {left} are there, all of them are used")
    return min(size, left)
