"""Examples in a seeded order, in batches and in micro-batches of at most so many tokens. Nothing is padded."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from turret.data import Dataset, Example
from turret.errors import DataError, RecipeError, TrainingError
from turret.recipe import Recipe, Train
from turret.tasks import Task
from turret.transformer import ModelConfig

GENERATED_ROWS = 32  # most texts that are generated at a time
CACHE_TOKENS = 8192  # of the KV cache of all these rows, unless one row needs more

# --- splits -----------------------------------------------------------------------------------------------------------
# The splits of a training: the examples to train on, and those that evaluations during training use.


CARVED = 0.1  # share of the training examples for validation, if it is needed and not named


@dataclass(frozen=True)
class Splits:
    """The examples to train on, and those that evaluations during training use."""

    train: Sequence[Example]
    watched: Sequence[Example] | None
    watched_name: str | None  # "validation" or "test"
    selects: bool  # whether evaluations choose the weights and stop early: only those on a validation split do
    note: str | None = None  # a decision that the recipe left open


def splits_of(recipe: Recipe, dataset: Dataset) -> Splits:
    """The data set's splits as the recipe uses them. Scores on the test split are reported and never choose."""
    chooses = recipe.train.keep == "best" or recipe.train.early_stopping is not None
    if chooses and recipe.train.evaluate == "never":
        raise RecipeError(
            'train.keep = "best" and train.early_stopping compare evaluations, but train.evaluate is "never": '
            'set train.evaluate to "epoch" or to a number of steps'
        )
    train, validation = dataset.train, dataset.validation
    note = None
    if chooses and not validation:
        if len(train) < 10:
            raise RecipeError(
                f"choosing needs a validation split and {len(train)} training examples are too few to take one from: "
                'name data.validation, or set train.keep to "last" without early_stopping'
            )
        order = list(range(len(train)))
        random.Random(recipe.split_seed).shuffle(order)
        held = max(1, round(CARVED * len(train)))
        train, validation = [train[i] for i in sorted(order[held:])], [train[i] for i in order[:held]]
        note = f"{held} of the training examples are held back as a validation split, because the recipe names none"
    if validation:
        return Splits(train, validation, "validation", selects=True, note=note)
    if dataset.test:
        return Splits(train, dataset.test, "test", selects=False)
    return Splits(train, None, None, selects=False)


# --- batches ----------------------------------------------------------------------------------------------------------


KEPT_STATES = 9_000_000  # numbers in the hidden states of all layers of one pass
FEWEST_TOKENS, MOST_TOKENS = 512, 2048  # of one pass, unless the recipe sets it
ENCODED_AT_ONCE = 1024  # examples
KEPT_TOKENS = 1 << 26  # tokens kept in memory (256 MB of int32); further examples are encoded again each time


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """An example as the model reads it, and what its loss is computed with.

    Args:
        source: (T,) int64, the token ids that are read.
        target: (T,) int64, the ids of a text that is written; None if a head answers.
        wanted: What a loss compares the head's output with; None: what the task's `targets` gives for the example.
    """

    example: Example
    source: Tensor
    target: Tensor | None
    cut: bool = False  # the input was longer than the limit
    target_cut: bool = False
    earlier: Tensor | None = None  # (K,) int64, positions in `source` of further tokens that the loss counts
    left_out: int = 0  # turns of a conversation that was longer than the limit
    whole: int | None = None  # tokens of the source before the cut, if known
    wanted: Tensor | None = None
    rival: Tensor | None = None  # (R,) int64, the ids of a text that is worse than the target
    read: Tensor | None = None  # (K,) int64, positions in `source`, as in `Encoded`
    number: int = 0  # in its step, which decides its dropout

    @property
    def tokens(self) -> int:
        """Tokens of source and target."""
        written = 0 if self.target is None else len(self.target)
        if self.rival is not None:  # two rows
            return 2 * len(self.source) + written + len(self.rival)
        return len(self.source) + written

    @property
    def weight(self) -> int:
        """The number of terms that the example has in the mean loss: 1, or the tokens in `counted` or `read`."""
        if self.read is not None:
            return len(self.read)
        if self.target is None or self.rival is not None:
            return 1
        return len(self.target) + (0 if self.earlier is None else len(self.earlier))

    @property
    def counted(self) -> Tensor:
        """The tokens that the loss counts, in the order of `adapters.packed.target_states`: (weight,) int64."""
        assert self.target is not None, "only of a task that generates"
        return self.target if self.earlier is None else torch.cat([self.source[self.earlier], self.target])


class EncodedRows:
    """Examples, encoded when first needed and cached as int32 up to `kept_tokens`."""

    def __init__(self, task: Task, examples: Sequence[Example], *, kept_tokens: int = KEPT_TOKENS) -> None:
        self.task, self.examples = task, examples
        self._cached: dict[int, tuple[EncodedRow, tuple[bytes | None, ...]]] = {}
        self._room = kept_tokens

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: Iterable[int]) -> list[EncodedRow]:
        """The items at these indices, in that order. Rows that are not cached are encoded together."""
        indices = list(indices)
        missing = [index for index in dict.fromkeys(indices) if index not in self._cached]
        encoded = dict(zip(missing, encode(self.task, [self.examples[index] for index in missing]), strict=True))
        for index, item in encoded.items():
            if item.tokens <= self._room:
                self._room -= item.tokens
                self._cached[index] = _pack(item)
        return [encoded[i] if i in encoded else _unpack(*self._cached[i]) for i in indices]

    def windows(self) -> list[tuple[Tensor, Tensor | None]]:
        """The rows that a head reads for all examples, in order: the ids of each, and the positions of `HeadRow`."""
        if self.task.reads_tokens:
            every = self.task.windows([example.asked for example in self.examples])
            return [(row.ids, row.read) for rows in every for row in rows]
        return [(item.source, item.read) for item in self.take(range(len(self)))]

    def lengths(self) -> list[int]:
        """The tokens of every item."""
        return [
            item.tokens
            for start in range(0, len(self), ENCODED_AT_ONCE)
            for item in self.take(range(start, min(len(self), start + ENCODED_AT_ONCE)))
        ]


_NO_IDS = {1: torch.empty(0, dtype=torch.long), 2: torch.empty(0, 2, dtype=torch.long)}  # with segments


def _pack(item: EncodedRow) -> tuple[EncodedRow, tuple[bytes | None, ...]]:
    """A row for the cache, and apart its ids as bytes of int32: a tensor takes 500 bytes beside its numbers."""
    bare = replace(item, source=_NO_IDS[item.source.ndim], target=None, earlier=None, rival=None, read=None)
    ids = (item.source, item.target, item.earlier, item.rival, item.read)
    return bare, tuple(None if each is None else each.to(torch.int32).numpy().tobytes() for each in ids)


def _unpack(bare: EncodedRow, kept: tuple[bytes | None, ...]) -> EncodedRow:
    """The row that was packed, with its ids in int64."""
    numbers = [None if each is None else np.frombuffer(each, dtype=np.int32).astype(np.int64) for each in kept]
    source, target, earlier, rival, read = (None if each is None else torch.from_numpy(each) for each in numbers)
    assert source is not None
    source = source.reshape(-1, *bare.source.shape[1:])
    return replace(bare, source=source, target=target, earlier=earlier, rival=rival, read=read)


def encode(task: Task, examples: Sequence[Example]) -> list[EncodedRow]:
    """The examples' token ids, cut at the task's limits."""
    return [
        EncodedRow(
            example,
            source.ids,
            target.ids if target else None,
            source.cut,
            target.cut if target else False,
            source.earlier,
            source.left_out,
            source.whole,
            rival=target.rival if target else None,
            read=source.read,
        )
        for example, (source, target) in zip(examples, task.encode_examples(examples), strict=True)
    ]


def spread_indices(count: int, most: int) -> Sequence[int]:
    """At most `most` of `count` indices, evenly spread."""
    return range(count) if count <= most else [place * count // most for place in range(most)]


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """The order of the examples in an epoch. It depends on seed and epoch alone, so a run can resume at any step."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(count, generator=generator).tolist()


@dataclass(frozen=True)
class Schedule:
    """The number of steps and the examples of each. The last batch of an epoch may be smaller."""

    examples: int
    batch_size: int
    epochs: int
    seed: int
    max_steps: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, examples: int) -> Schedule:
        """The schedule for so many training examples. Raises TrainingError if a default is not filled in."""
        train = recipe.train
        if train.epochs is None or train.lr is None:
            missing = "epochs" if train.epochs is None else "lr"
            raise TrainingError(f"train.{missing} is not set: fill in the recipe's defaults first, see train.filled")
        return cls(examples, train.batch_size, train.epochs, recipe.seed, train.max_steps)

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise DataError("no examples to train on: give data.train or another source")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples // self.batch_size)

    @property
    def steps(self) -> int:
        """All optimiser steps of the run."""
        every = self.steps_per_epoch * self.epochs
        return every if self.max_steps is None else min(every, self.max_steps)

    def epoch_after(self, step: int) -> float:
        """Epochs done after a step: 1.5 is the middle of the second."""
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


def micro_batches(items: Sequence[EncodedRow], most_tokens: int) -> list[list[EncodedRow]]:
    """The batch in pieces of at most `most_tokens` tokens, in order. A longer example is a piece of its own."""
    pieces = _pieces(range(len(items)), [item.tokens for item in items], most_tokens)
    return [[items[index] for index in piece] for piece in pieces]


def pass_tokens(train: Train, config: ModelConfig, on_gpu: int | None = None) -> int:
    """The largest number of tokens in one pass: the recipe's `micro_batch_tokens`, else a number that suits the base.

    Larger passes use the processor better. They also save more for the backward pass, in proportion to layers times
    hidden size.

    Args:
        on_gpu: `Base.pass_tokens`.
    """
    if train.micro_batch_tokens is not None:
        return train.micro_batch_tokens
    if on_gpu is not None:
        return on_gpu
    fitting = KEPT_STATES // (config.num_hidden_layers * config.hidden_size)
    return min(max(fitting // 64 * 64, FEWEST_TOKENS), MOST_TOKENS)


def by_length(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Indices sorted by length, in pieces of at most `most_tokens` tokens. Used in evaluation."""
    return _pieces(sorted(range(len(lengths)), key=lambda each: (lengths[each], each)), lengths, most_tokens)


def _pieces(indices: Iterable[int], lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    pieces: list[list[int]] = []
    room = 0
    for index in indices:
        if not pieces or lengths[index] > room:
            pieces.append([])
            room = most_tokens
        pieces[-1].append(index)
        room -= lengths[index]
    return pieces
