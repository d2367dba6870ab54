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

from turret import adapters, heap
from turret.train import memory
from turret.train.batches import Item, Items, Schedule, micro_batches, pass_tokens
from turret.train.seeds import Randomness
from turret.train.start import Start, attach
from turret.train.step import backward, loss_of

LONG = 3.0  # seconds of a step that is not run twice to be timed
TOLD_APART = 0.3  # seconds, of which the system counts hundredths
LOOKED_AT = 50  # batches, of which the typical and the largest are taken


@dataclass(frozen=True)
class Cost:
    """Seconds of a typical optimiser step, and bytes by component at the largest one."""

    seconds: float
    step_tokens: float
    memory: memory.Prediction
    trainable: int  # weights
    others: float  # processors that other processes kept busy meanwhile


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
    start: Start | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Attach the recipe's adapter, run forward and backward on a typical batch and on the largest piece, detach.

    What a pass takes is what the process grew by at its peak, where the system tells (Linux), and never less than what
    was counted. What the libraries keep for good by then (a plan for every shape, say) counts as runtime.
    """
    batches = [items.take(indices) for (_, indices), _ in zip(schedule.batches(), range(LOOKED_AT), strict=False)]
    most = pass_tokens(recipe.train, base.model.config)
    typical = sorted(batches, key=_tokens)[len(batches) // 2]
    largest = max((piece for batch in batches for piece in micro_batches(batch, most)), key=_tokens)
    model = base.model
    randomness = Randomness(recipe.seed, model.device)
    with randomness:
        attach(recipe, base, task, start)
        try:
            model.train()
            trainable = memory.trainable_bytes(adapters.trainable_parameters(model))
            backward(loss_of(model, task, typical[:1]))  # the first pass of all is slow
            saved = memory.SavedForBackward(model)
            others, seconds = Others(), math.inf
            for _ in range(2):  # the better of two: a neighbour's burst must not become the plan
                started = clock()
                for piece in micro_batches(typical, most):
                    backward(loss_of(model, task, piece))
                seconds = min(seconds, clock() - started)
                if seconds > LONG:
                    break
            busy = others.busy()
            with memory.grown() as grown:
                with saved.counting():
                    loss = loss_of(model, task, largest)
                backward(loss)  # outside: what is counted is held until then, and must be given up layer by layer
                del loss
            rounded = adapters.rounded_bytes(adapters.attachment(model).route)
        finally:
            adapters.detach(model)
            model.eval()
    heap.give_back()
    prediction = memory.Prediction(
        weights=base.bytes,
        trainable=trainable,
        gradients=trainable,
        optimiser=2 * trainable,
        activations=max(grown.bytes, saved.bytes + 2 * saved.largest),
        rounded=rounded,
        runtime=max(0, memory.resident() - base.bytes),
    )
    return Cost(seconds, sum(map(_tokens, batches)) / len(batches), prediction, trainable // 4, busy)


def _tokens(batch: Sequence[Item]) -> int:
    return sum(item.tokens for item in batch)
