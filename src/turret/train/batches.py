"""Which examples make which step, and in what pieces: seeded order, batches, micro-batches of at most so many tokens.

Knows lengths and indices. Refuses to know models and losses; padding is nobody's business here, because there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turret.errors import DataError

KEPT_TOKENS = 1 << 26  # encoded examples are kept up to here (256 MB of int32); further ones are encoded anew


@dataclass(frozen=True)
class Item:
    """One example as the model sees it."""

    example: Any  # Labelled or Pair
    source: Tensor  # (n,) int64
    target: Tensor | None  # (m,) int64; None for classification
    cut: bool = False  # the input was longer than the limit
    target_cut: bool = False

    @property
    def tokens(self) -> int:
        return len(self.source) + (0 if self.target is None else len(self.target))

    @property
    def weight(self) -> int:
        """How many terms of the mean loss are this example's: one, or its target tokens."""
        return 1 if self.target is None else len(self.target)


class Items(Sequence[Item]):
    """Examples encoded when first needed and kept (as int32) while there is room."""

    def __init__(self, task: Any, examples: Sequence[Any], *, kept_tokens: int = KEPT_TOKENS) -> None:
        self.task, self.examples = task, examples
        self._kept: dict[int, tuple[Tensor, Tensor | None, bool, bool]] = {}
        self._room = kept_tokens

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._kept:
            item = encode(self.task, self.examples[index])
            if self._room < item.tokens:
                return item
            self._room -= item.tokens
            target = None if item.target is None else item.target.int()
            self._kept[index] = (item.source.int(), target, item.cut, item.target_cut)
        source, target, cut, target_cut = self._kept[index]
        return Item(self.examples[index], source.long(), None if target is None else target.long(), cut, target_cut)


def is_pairs(task: Any) -> bool:
    """Whether the task's examples are pairs of source and target texts (else texts with labels)."""
    return hasattr(task, "encode_target")


def encode(task: Any, example: Any) -> Item:
    """The token ids of one example, cut as the task says."""
    if is_pairs(task):
        source, target = task.encode_source(example.source), task.encode_target(example.target)
        return Item(example, source.ids, target.ids, bool(source.cut), bool(target.cut))
    encoded = task.encode(example.text)
    return Item(example, encoded.ids, None, bool(encoded.cut))


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """The order of the examples in an epoch: of seed and epoch alone, so any step can be found again."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


@dataclass(frozen=True)
class Schedule:
    """How many steps there are and which examples each takes. The last batch of an epoch is what is left."""

    examples: int
    batch_size: int
    epochs: int
    seed: int
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise DataError("no examples to train on: give data.train or another source")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples // self.batch_size)

    @property
    def steps(self) -> int:
        every = self.steps_per_epoch * self.epochs
        return every if self.max_steps is None else min(every, self.max_steps)

    def epoch_after(self, step: int) -> float:
        return step / self.steps_per_epoch

    def batches(self, after: int = 0) -> Iterator[tuple[int, list[int]]]:
        """(step, indices) for the steps `after` + 1, ..., `steps`."""
        step = after
        while step < self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            order = epoch_order(self.examples, seed=self.seed, epoch=epoch)
            while place < self.steps_per_epoch and step < self.steps:
                step += 1
                yield step, order[place * self.batch_size : (place + 1) * self.batch_size]
                place += 1


def micro_batches(items: Sequence[Item], most_tokens: int) -> list[list[Item]]:
    """The batch in pieces of at most `most_tokens` tokens, in order; an example longer than that is a piece alone."""
    pieces: list[list[Item]] = []
    room = 0
    for item in items:
        if not pieces or item.tokens > room:
            pieces.append([])
            room = most_tokens
        pieces[-1].append(item)
        room -= item.tokens
    return pieces


def by_length(count: int, length: Callable[[int], int], most_tokens: int) -> list[list[int]]:
    """Indices in pieces of at most `most_tokens` tokens, neighbours in length together: for evaluation."""
    pieces: list[list[int]] = []
    room = 0
    for index in sorted(range(count), key=lambda each: (length(each), each)):
        size = length(index)
        if not pieces or size > room:
            pieces.append([])
            room = most_tokens
        pieces[-1].append(index)
        room -= size
    return pieces
