"""Measures the time and memory of a training by a few passes on the real model, which is left as it was.

On a GPU, which computes while Python goes on, every time is taken after it has computed all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from turret import adapters, heap
from turret.bases import Base, synchronize
from turret.data import Example
from turret.recipe import Recipe
from turret.tasks import Task, has_head, writes
from turret.train import memory
from turret.train.batches import Item, Items, Schedule, micro_batches, pass_tokens
from turret.train.evaluation import GENERATED_ROWS, evaluate, generate
from turret.train.initialize import InitialAdapter, attach
from turret.train.linear_start import head_start
from turret.train.moments import moment_bytes
from turret.train.seeds import Randomness
from turret.train.step import backward, loss_of
from turret.transformer import Model

LONG = 3.0  # seconds; a step this long is timed once instead of twice
TIMED = 0.3  # seconds; a shorter span is too short to count, because the system counts hundredths
SAMPLED = 50  # batches, of which the typical and the largest are measured
FIRST_TOKENS = (1, 5)  # new tokens of each text in the two timed generations
CARD_GROWTH = 1.05  # a card's allocator gives back what it has freed, whole
HEAP_GROWTH = 1.2  # the heap after hundreds of passes of other sizes, divided by the heap after a few
BETWEEN_STEPS = 10 << 20  # bytes of the checkpoint and the curve
SIZES = 5  # sizes of a pass that are tried, because each leaves other holes in the heap


@dataclass(frozen=True)
class GenerationTime:
    """Seconds of generating texts with the KV cache.

    Args:
        prompt: seconds to read one row's prompt.
        step: seconds of one decode step for all rows of a batch.
    """

    prompt: float
    step: float

    def seconds(self, rows: int, new_tokens: int) -> float:
        """The time of generating `new_tokens` for every row, if no text ends early."""
        return rows * self.prompt + -(-rows // GENERATED_ROWS) * new_tokens * self.step


@dataclass(frozen=True)
class Cost:
    """Seconds of a typical optimiser step, and bytes by component at the largest one."""

    seconds: float
    head_start: float  # most seconds of the head's start, which is before the first step; 0 without one
    step_tokens: float
    memory: memory.Prediction
    trainable: int  # weights
    others: float  # processors that other processes kept busy during the measurement
    generation: GenerationTime | None  # None if the task generates no text


class OtherProcesses:
    """Counts the processors that other processes keep busy, from its creation to `busy`."""

    def __init__(self) -> None:
        self._started, self._before = time.perf_counter(), self._cpu_seconds()

    def busy(self) -> float:
        """The average number of busy processors; 0 if the time is too short to tell."""
        seconds = time.perf_counter() - self._started
        return max(0.0, (self._cpu_seconds() - self._before) / seconds) if seconds >= TIMED else 0.0

    @staticmethod
    def _cpu_seconds() -> float:
        """Processor seconds of all other processes. Guests are left out: their time is counted as user time already."""
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = sum(getattr(machine, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
        return float(sum(machine) - idle - own.user - own.system)


def measure(
    recipe: Recipe,
    base: Base,
    task: Task,
    items: Items,
    schedule: Schedule,
    *,
    before: int | None = None,
    start: InitialAdapter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Attach the recipe's adapter, run passes on real batches as a training does, and detach it.

    First, forward and backward passes on a typical batch are timed. Then memory is measured: forward and backward
    passes on pieces of several sizes up to the largest, and a pass without gradients as in an evaluation. The growth of
    the process up to the second part counts as `prepared`: examples and libraries. Its growth at the peak of the second
    part counts as `activations`: saved tensors, temporaries, and holes in the heap, because a training keeps freed
    memory. `activations` is at least what the largest piece saved for its backward pass.

    On a card the same is measured of its tensors there.

    Args:
        before: bytes of the process after the base was loaded; None: now. Growth since then counts as `prepared`.
        start: the adapter to continue from.
        clock: seconds.
    """
    sampled = [indices for (_, indices), _ in zip(schedule.batches(), range(SAMPLED), strict=False)]
    batches = [items.take(indices) for indices in sampled]
    model: Model = base.model
    most = pass_tokens(recipe.train, model.config)
    typical = sorted(batches, key=_tokens)[len(batches) // 2]
    pieces = sorted((piece for batch in batches for piece in micro_batches(batch, most)), key=_tokens)
    device, on_card = model.device, model.device.type != "cpu"
    clock = _synchronized(clock, device) if on_card else clock
    randomness = Randomness(recipe.seed, device)
    before = memory.resident(device) if before is None else before
    with heap.keep_freed(), randomness:
        attach(recipe, base, task, start)
        try:
            model.train()
            trainable = memory.trainable_bytes(adapters.trainable_parameters(model))
            backward(loss_of(model, task, typical[:1]))  # warm up: the first pass is slow
            evaluate(model, task, items.examples[:1], texts=False)  # loads the libraries that score
            others = OtherProcesses()
            seconds = _seconds(model, task, micro_batches(typical, most), clock)
            busy = others.busy()
            begins = head_start(recipe, base, task, items, most) if start is None and has_head(task) else None
            before_steps = 0.0 if begins is None else begins.most_seconds(seconds, schedule.steps, clock)
            with memory.grown(device) as grown:  # from the state in which a training starts: libraries, a trimmed heap
                begun = memory.resident(device)
                saved = _saved_by(model, task, pieces, 1 if seconds > LONG else SIZES)
                _evaluate(model, task, items, {place for indices in sampled for place in indices}, most)
            rounded = adapters.rounded_bytes(adapters.attachment(model).context)
            texts = [item for batch in batches for item in batch][:GENERATED_ROWS]  # a step of fewer rows is faster
            generation = _generation_time(model, task, texts, clock)
        finally:
            adapters.detach(model)
            model.eval()
    heap.release()
    prediction = memory.Prediction(
        weights=base.bytes,
        trainable=trainable,
        gradients=trainable,
        optimiser=moment_bytes(recipe.train.optimizer, trainable // 4),
        activations=max(
            round((CARD_GROWTH if on_card else HEAP_GROWTH) * grown.bytes), saved.bytes + 2 * saved.largest
        ),
        rounded=rounded,
        prepared=(0 if on_card else BETWEEN_STEPS) + max(0, begun - before - 2 * trainable - rounded),
        runtime=max(0, before - base.bytes),
    )
    return Cost(
        seconds, before_steps, sum(map(_tokens, batches)) / len(batches), prediction, trainable // 4, busy, generation
    )


def _synchronized(clock: Callable[[], float], device: torch.device) -> Callable[[], float]:
    """The clock, read when the device has computed all that was asked of it."""

    def read() -> float:
        synchronize(device)
        return clock()

    return read


def _seconds(model: Model, task: Task, pieces: Sequence[Sequence[Item]], clock: Callable[[], float]) -> float:
    """Seconds of a step of these pieces: the shorter of two, in case another process was busy during one."""
    seconds = math.inf
    for _ in range(2):
        started = clock()
        for piece in pieces:
            backward(loss_of(model, task, piece))
        seconds = min(seconds, clock() - started)
        if seconds > LONG:
            break
    return seconds


def _saved_by(model: Model, task: Task, pieces: Sequence[Sequence[Item]], sizes: int) -> memory.SavedForBackward:
    """Run pieces of so many sizes, smallest first; returns what the largest saved for its backward pass."""
    for place in range(1, sizes):
        backward(loss_of(model, task, pieces[(len(pieces) - 1) * place // sizes]))
    for _ in range(min(sizes, 2)):
        saved = memory.SavedForBackward(model)
        with saved.counting():
            loss = loss_of(model, task, pieces[-1])
        backward(loss)  # outside `counting`, which keeps every saved tensor: a backward pass frees them by layer
        del loss
    return saved


def _evaluate(model: Model, task: Task, items: Items, places: set[int], most_tokens: int) -> None:
    """An evaluation of the longest of these items: two passes of the size that an evaluation uses."""
    room, chosen = 2 * most_tokens, list[Example]()
    for place, item in sorted(zip(places, items.take(list(places)), strict=True), key=lambda each: -each[1].tokens):
        room -= item.tokens
        if room < 0 and chosen:
            break
        chosen.append(items.examples[place])
    evaluate(model, task, chosen, most_tokens=most_tokens, texts=False)


def _generation_time(
    model: Model, task: Task, items: Sequence[Item], clock: Callable[[], float]
) -> GenerationTime | None:
    """Generate a few texts at two lengths: the difference is the time of the further tokens."""
    if not writes(task):
        return None
    model.eval()
    seconds = []
    for new_tokens in FIRST_TOKENS:
        started = clock()
        with torch.no_grad():
            generate(model, task, [item.source for item in items], new_tokens=new_tokens)
        seconds.append(clock() - started)
    step = max(0.0, seconds[1] - seconds[0]) / (FIRST_TOKENS[1] - FIRST_TOKENS[0])
    return GenerationTime(max(0.0, seconds[0] - FIRST_TOKENS[0] * step) / len(items), step)


def _tokens(batch: Sequence[Item]) -> int:
    return sum(item.tokens for item in batch)
