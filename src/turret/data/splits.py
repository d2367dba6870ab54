"""Chooses the training, validation and test rows from the numbers of rows and a seed.

- A split that the recipe names is used whole.
- A number or a fraction is taken from the split of that name if the source has one, else from the training table.
- Defaults: for test the test split, else a fifth of the training table, at most `MOST_TEST` rows; for validation the
  validation split, else none; for train all remaining rows.
- Rows are shuffled with the seed. Test rows are taken first, then validation rows, then training rows, so the test
  examples do not depend on the number of training examples.
- With `data.stratify` every split has the same shares of the classes. With `data.group` all rows of a group go to one
  split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from turret.data.source import canonical_split
from turret.data.table import DataSettings, Size
from turret.errors import DataError, listed, shown

SplitRole = Literal["train", "validation", "test"]
ROLES: tuple[SplitRole, ...] = ("train", "validation", "test")
MOST_TEST = 1000
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Sources:
    """The split of the source that each role reads."""

    split: dict[SplitRole, str]  # role -> name of the split; without roles that have no examples
    carved: tuple[SplitRole, ...]  # roles that take their rows from the training table


@dataclass(frozen=True)
class Chosen:
    """Row numbers among the usable rows of a split, in the order of the examples."""

    rows: dict[SplitRole, npt.NDArray[np.int64]]
    notes: tuple[str, ...]


def find_sources(data: DataSettings, splits: Sequence[str]) -> Sources:
    """The split of each role, by the names of the source's splits. Raises DataError.

    Args:
        data: a recipe's `[data]`.
        splits: names of the source's splits.
    """
    sizes = {role: getattr(data, role) for role in ROLES}
    named: dict[SplitRole, str] = {
        role: _lookup(role, size, splits) for role, size in sizes.items() if isinstance(size, str)
    }
    twice = [role for role in named if list(named.values()).count(named[role]) > 1]
    if twice:
        raise DataError(f"{' and '.join(twice)} are both the split {shown(named[twice[0]])}: name different splits")
    free = {canonical_split(split): split for split in reversed(splits) if split not in named.values()}
    train = named.get("train") or free.get("train") or (splits[0] if len(splits) == 1 and not named else None)
    if train is None:
        raise DataError(f"there is no training split: the splits are {listed(splits)}, so name one in data.train")
    found: dict[SplitRole, str] = {"train": train}
    carved: list[SplitRole] = []
    for role in ("test", "validation"):
        split = named.get(role) or free.get(role)
        if split is not None and split != train:
            found[role] = split
        elif role == "test" or sizes[role] is not None:
            found[role] = train
            carved.append(role)
    return Sources(found, tuple(carved))


def test_split(data: DataSettings, splits: Sequence[str]) -> str:
    """The split to evaluate on: the named one, else the test split, else the only one, else validation."""
    if isinstance(data.test, str):
        return _lookup("test", data.test, splits)
    free = {canonical_split(split): split for split in reversed(splits)}
    for split in ("test", "validation"):
        if split in free or len(splits) == 1:
            return free.get(split, splits[0])
    raise DataError(f"which split to evaluate on? The splits are {listed(splits)}: name one in data.test")


def _lookup(role: SplitRole, name: str, splits: Sequence[str]) -> str:
    if name in splits and name:
        return name
    for split in splits:
        if split and canonical_split(split) == canonical_split(name):
            return split
    there = f"the splits are {listed(splits)}" if any(splits) else "the source is one table without splits"
    raise DataError(f"data.{role} = {shown(name)}, but {there}: give a number, a fraction, or one of the splits")


@dataclass(frozen=True)
class Kinship:
    """What the usable rows of one split have in common, as far as it decides where they go."""

    classes: npt.NDArray[np.int64] | None = None  # the class of each row, for `data.stratify`
    groups: npt.NDArray[np.uint64] | None = None  # the group of each row, for `data.group`


def choose_rows(
    data: DataSettings,
    sources: Sources,
    counts: Mapping[str, int],
    seed: int,
    kin: Mapping[str, Kinship] | None = None,
) -> Chosen:
    """Choose the rows of each role. Raises DataError if none are left to train on.

    Args:
        counts: number of usable rows, by split.
        kin: classes and groups of the rows, by split.
    """
    notes: list[str] = []
    rows: dict[SplitRole, npt.NDArray[np.int64]] = {}
    kin = kin or {}
    train = sources.split["train"]
    own = kin.get(train, Kinship())
    order = arrange_rows(counts[train], seed, own)
    start = 0
    for role in ("test", "validation"):
        if role not in sources.split:
            rows[role] = order[:0]
        elif role in sources.carved:
            count = _carved_count(getattr(data, role), counts[train], notes)
            end = start + count if own.groups is None else _end_of_group(own.groups[order], start + count)
            rows[role] = order[start:end]
            start = end
        else:
            split = sources.split[role]
            count = count_taken(role, getattr(data, role), counts[split], counts[split], notes)
            rows[role] = arrange_rows(counts[split], seed, kin.get(split, Kinship()))[:count]
    left = counts[train] - start
    if left < 1 and own.groups is not None and start:
        raise DataError(
            f"data.group = {shown(data.group, 40)}: the {len(np.unique(own.groups))} groups cannot be split so that "
            "one is left to train on: lower data.test and data.validation, or leave data.group out"
        )
    if left < 1:
        raise DataError(
            f"{counts[train]} usable rows and {start} of them held out leave none to train on: "
            "give more rows, or lower data.test and data.validation"
        )
    rows["train"] = order[start : start + count_taken("train", data.train, counts[train], left, notes)]
    return Chosen({role: rows[role] for role in ROLES}, tuple(notes))


def arrange_rows(count: int, seed: int, kin: Kinship) -> npt.NDArray[np.int64]:
    """The order in which the rows of a split are taken: shuffled, every part with the same classes, groups together.

    For classes, row i of the n_c rows of class c gets the place (i + 1/2) / n_c, and rows are sorted by their places.
    So every stretch of the order has each class in its share of the table, to within about one row for each class.
    """
    order = shuffle_rows(count, seed)
    if kin.groups is not None:
        groups, group_of = np.unique(kin.groups, return_inverse=True)
        rank = shuffle_rows(len(groups), seed)
        return order[np.argsort(rank[group_of[order]], kind="stable")]
    if kin.classes is not None:
        places = np.zeros(count)
        for each in np.unique(kin.classes):
            members = order[kin.classes[order] == each]
            places[members] = (np.arange(len(members)) + 0.5) / len(members)
        return order[np.argsort(places[order], kind="stable")]
    return order


def _end_of_group(groups: npt.NDArray[np.uint64], end: int) -> int:
    """The first place from `end` on where a new group begins; if that is the end of the rows, the last one before it.

    Args:
        groups: of the rows in their order.
    """
    begins = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    after, before = begins[begins >= end], begins[begins < end]
    if len(after):
        return int(after[0])
    return int(before[-1]) if len(before) else len(groups)


def shuffle_rows(count: int, seed: int) -> npt.NDArray[np.int64]:
    """A permutation of `count` numbers that never changes for a seed."""
    # RandomState's stream is frozen. A Generator's may change with numpy, and the test set with it.
    return np.random.RandomState(seed).permutation(count)


def _carved_count(size: Size, total: int, notes: list[str]) -> int:
    if size is None or isinstance(size, str):  # only the test split is carved without a size
        count = min(MOST_TEST, max(1, round(TEST_SHARE * total)))
        notes.append(f"no test split and none asked for: {count} of {total} rows are held out for the test")
        return count
    return max(1, round(size * total)) if isinstance(size, float) else size


def count_taken(role: SplitRole, size: Size, total: int, left: int, notes: list[str]) -> int:
    """The number of rows to take of those that are left. A note reports if there are fewer than asked for.

    Args:
        total: rows that a fraction refers to.
    """
    if size is None or isinstance(size, str):
        return left
    count = max(1, round(size * total)) if isinstance(size, float) else size
    if count > left:
        notes.append(f"{role}: {count} examples asked for, {left} are there, all of them are used")
    return min(count, left)
