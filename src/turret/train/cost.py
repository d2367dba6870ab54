"""What a training will cost, measured on the real model: two passes on real examples, and the model as it was after.

Knows models, micro-batches, seconds and bytes. Refuses to judge: `plan` compares with what the machine has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from turret import adapters, heap
from turret.train import memory
from turret.train.batches import Item, Items, Schedule, micro_batches, pass_tokens
from turret.train.evaluation import GENERATED_ROWS, generate
from turret.train.initialize import InitialAdapter, attach
from turret.train.seeds import Randomness
from turret.train.step import backward, loss_of

LONG = 3.0  # seconds of a step that is not run twice to be timed
TOLD_APART = 0.3  # seconds, of which the system counts hundredths
LOOKED_AT = 50  # batches, of which the typical and the largest are taken
WRITTEN, FIRST_TOKENS = 8, (1, 5)  # texts that are begun, and how far
HOLES = 1.2  # what a heap holds after hundreds of passes of other sizes, over what it holds after a few
BESIDE = 10 << 20  # bytes for what a run does between steps: its checkpoint, its curve
SIZES = 5  # sizes of a pass that are tried: a heap has other holes after each


@dataclass(frozen=True)
class Writing:
    """Seconds of generating texts with the cache, for a few rows at a time."""

    prompt: float  # of reading one row's prompt
    step: float  # of one more token for all rows

    def seconds(self, rows: int, new_tokens: int) -> float:
        """Of so many rows in batches, with so many new tokens each: what it takes where no text ends early."""
        return rows * self.prompt + -(-rows // GENERATED_ROWS) * new_tokens * self.step


@dataclass(frozen=True)
class Cost:
    """Seconds of a typical optimiser step, and bytes by component at the largest one."""

    seconds: float
    step_tokens: float
    memory: memory.Prediction
    trainable: int  # weights
    others: float  # processors that other processes kept busy meanwhile
    writing: Writing | None  # None where the task writes no text


class Others:
    """How many processors other processes keep busy, from here to `busy`; 0 where the time is too short to tell."""

    def __init__(self) -> None:
        self._began, self._before = time.perf_counter(), self._worked()

    def busy(self) -> float:
        seconds = time.perf_counter() - self._began
        return max(0.0, (self._worked() - self._before) / seconds) if seconds >= TOLD_APART else 0.0

    @staticmethod
    def _worked() -> float:
        """Processor seconds of all processes but this one, since some moment. A guest's are its host's too."""
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = sum(getattr(machine, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
        return float(sum(machine) - idle - own.user - own.system)


def measure(
    recipe: Any,
    base: Any,
    task: Any,
    items: Items,
    schedule: Schedule,
    *,
    before: int | None = None,
    start: InitialAdapter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Attach the recipe's adapter, run what a training runs on real batches, and detach.

    The passes are: forward and backward on a typical batch, timed; then on pieces of other sizes and on the largest
    piece; and a pass without gradients, as in an evaluation. What the process took until the second group begins counts
    as prepared: examples, libraries, plans of products. What it grows by at the peak of the second group counts as
    activations: also temporaries, and the holes between blocks of many sizes, since a training keeps what a pass frees.
    It is never less than what was counted of the largest piece.

    Args:
        before: bytes of the process once the base was loaded; what reading the examples took since then counts too.
    """
    batches = [items.take(indices) for (_, indices), _ in zip(schedule.batches(), range(LOOKED_AT), strict=False)]
    most = pass_tokens(recipe.train, base.model.config)
    typical = sorted(batches, key=_tokens)[len(batches) // 2]
    pieces = sorted((piece for batch in batches for piece in micro_batches(batch, most)), key=_tokens)
    model = base.model
    randomness = Randomness(recipe.seed, model.device)
    before = memory.resident() if before is None else before
    with heap.kept(), randomness:
        attach(recipe, base, task, start)
        try:
            model.train()
            trainable = memory.trainable_bytes(adapters.trainable_parameters(model))
            backward(loss_of(model, task, typical[:1]))  # the first pass of all is slow
            others = Others()
            seconds = _seconds(model, task, micro_batches(typical, most), clock)
            busy = others.busy()
            with memory.grown() as grown:  # from where a training will begin: the libraries are there, the heap is tidy
                begun = memory.resident()
                saved = _kept_by(model, task, pieces, 1 if seconds > LONG else SIZES)
                _evaluate(model, task, [item for batch in batches for item in batch], most)
            rounded = adapters.rounded_bytes(adapters.attachment(model).context)
            writing = None if typical[0].target is None else _writing(model, task, typical[:WRITTEN], clock)
        finally:
            adapters.detach(model)
            model.eval()
    heap.give_back()
    prediction = memory.Prediction(
        weights=base.bytes,
        trainable=trainable,
        gradients=trainable,
        optimiser=2 * trainable,
        activations=max(round(HOLES * grown.bytes), saved.bytes + 2 * saved.largest),
        rounded=rounded,
        prepared=BESIDE + max(0, begun - before - 2 * trainable - rounded),
        runtime=max(0, before - base.bytes),
    )
    return Cost(seconds, sum(map(_tokens, batches)) / len(batches), prediction, trainable // 4, busy, writing)


def _seconds(model: Any, task: Any, pieces: Sequence[Sequence[Item]], clock: Callable[[], float]) -> float:
    """Seconds of a step of these pieces: the shorter of two, so that a neighbour's burst does not become the plan."""
    seconds = math.inf
    for _ in range(2):
        started = clock()
        for piece in pieces:
            backward(loss_of(model, task, piece))
        seconds = min(seconds, clock() - started)
        if seconds > LONG:
            break
    return seconds


def _kept_by(model: Any, task: Any, pieces: Sequence[Sequence[Item]], sizes: int) -> memory.SavedForBackward:
    """Run pieces of so many sizes, from the least to the largest; what the largest kept for its backward pass."""
    for place in range(1, sizes):
        backward(loss_of(model, task, pieces[(len(pieces) - 1) * place // sizes]))
    for _ in range(min(sizes, 2)):
        saved = memory.SavedForBackward(model)
        with saved.counting():
            loss = loss_of(model, task, pieces[-1])
        backward(loss)  # outside: what is counted is held until then, and must be given up layer by layer
        del loss
    return saved


def _evaluate(model: Any, task: Any, items: Sequence[Item], most_tokens: int) -> None:
    """A pass without gradients on the longest texts, as many as an evaluation takes at once."""
    longest_first = sorted(items, key=lambda item: -item.tokens)
    model.eval()
    with torch.no_grad():
        loss_of(model, task, micro_batches(longest_first, most_tokens)[0])


def _writing(model: Any, task: Any, items: Sequence[Item], clock: Callable[[], float]) -> Writing:
    """Time the first tokens of a few texts: two lengths, whose difference is what a token takes."""
    model.eval()
    seconds = []
    for new_tokens in FIRST_TOKENS:
        started = clock()
        with torch.no_grad():
            generate(model, task, [item.source for item in items], new_tokens=new_tokens)
        seconds.append(clock() - started)
    step = max(0.0, seconds[1] - seconds[0]) / (FIRST_TOKENS[1] - FIRST_TOKENS[0])
    return Writing(max(0.0, seconds[0] - FIRST_TOKENS[0] * step) / len(items), step)


def _tokens(batch: Sequence[Item]) -> int:
    return sum(item.tokens for item in batch)
