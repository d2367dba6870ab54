"""Which examples make which step, and in what pieces: seeded order, batches, micro-batches of at most so many tokens.

Knows lengths and indices. Refuses to know models and losses; padding is nobody's business here, because there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turret.errors import DataError

KEPT_STATES = 9_000_000  # hidden states of all layers in one pass
FEWEST_TOKENS, MOST_TOKENS = 512, 2048  # of one pass, where the recipe says nothing
ENCODED_AT_ONCE = 1024  # examples
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


class Items:
    """Examples as the model sees them, encoded when first needed and kept (as int32) while there is room."""

    def __init__(self, task: Any, examples: Sequence[Any], *, kept_tokens: int = KEPT_TOKENS) -> None:
        self.task, self.examples = task, examples
        self._kept: dict[int, Item] = {}
        self._room = kept_tokens

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: Iterable[int]) -> list[Item]:
        """The items at these places, in that order; those not seen before are encoded together."""
        wanted = list(indices)
        new = [index for index in dict.fromkeys(wanted) if index not in self._kept]
        fresh = dict(zip(new, encode(self.task, [self.examples[index] for index in new]), strict=True))
        for index, item in fresh.items():
            if item.tokens <= self._room:
                self._room -= item.tokens
                self._kept[index] = _narrow(item)
        return [fresh[index] if index in fresh else _wide(self._kept[index]) for index in wanted]

    def lengths(self) -> list[int]:
        """Tokens of every item."""
        return [
            item.tokens
            for start in range(0, len(self), ENCODED_AT_ONCE)
            for item in self.take(range(start, min(len(self), start + ENCODED_AT_ONCE)))
        ]


def _narrow(item: Item) -> Item:
    return replace(item, source=item.source.int(), target=None if item.target is None else item.target.int())


def _wide(item: Item) -> Item:
    return replace(item, source=item.source.long(), target=None if item.target is None else item.target.long())


def encode(task: Any, examples: Sequence[Any]) -> list[Item]:
    """The token ids of some examples, cut as the task says."""
    return [
        Item(example, source.ids, None, source.cut)
        if target is None
        else Item(example, source.ids, target.ids, source.cut, target.cut)
        for example, (source, target) in zip(examples, task.encode_examples(examples), strict=True)
    ]


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


def pass_tokens(train: Any, config: Any) -> int:
    """Most tokens of one pass: the recipe's `micro_batch_tokens`, else as many as suit the base.

    Larger passes use a processor better and keep more for the backward pass, in proportion to layers times width.
    """
    if train.micro_batch_tokens is not None:
        return int(train.micro_batch_tokens)
    fitting = KEPT_STATES // (config.num_hidden_layers * config.hidden_size)
    return int(min(max(fitting // 64 * 64, FEWEST_TOKENS), MOST_TOKENS))


def by_length(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Indices in pieces of at most `most_tokens` tokens, neighbours in length together: for evaluation."""
    pieces: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda each: (lengths[each], each)):
        if not pieces or lengths[index] > room:
            pieces.append([])
            room = most_tokens
        pieces[-1].append(index)
        room -= lengths[index]
    return pieces
