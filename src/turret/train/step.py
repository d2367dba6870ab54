"""One optimiser step: the gradient of a batch's mean loss, in micro-batches, without padding. Knows no schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from turret.adapters import mixed_precision, packed
from turret.errors import LossNotFinite, OutOfMemory
from turret.train.batches import Item, micro_batches
from turret.train.memory import Prediction
from turret.train.optim import AdamW
from turret.train.processes import ALONE, Processes

TARGETS = 32  # whose logits are there at a time


def train_step(
    model: Any,
    task: Any,
    optimiser: AdamW,
    batch: Sequence[Item],
    *,
    rate: float,
    clip: float,
    most_tokens: int,
    processes: Processes = ALONE,
) -> tuple[float, float]:
    """One update from the gradient of the mean loss over the whole batch, computed in micro-batches.

    The mean is over examples (classify) or target tokens (generate) of the batch, so the split into micro-batches, and
    of the batch among processes, changes nothing but the order of summation. Returns (loss, gradient norm before
    clipping), both before the update.
    """
    optimiser.zero_gradients()
    total = sum(item.weight for item in batch)
    losses = []
    for piece in micro_batches(processes.share(batch), most_tokens):
        part = loss_of(model, task, piece) * (sum(item.weight for item in piece) / total)
        backward(part)
        losses.append(part.detach())
    # a process may have nothing of a short batch
    mean = torch.stack(losses).sum().float() if losses else optimiser.gradients.new_zeros(())
    processes.sum(optimiser.gradients, mean)  # from here on every process does the same
    loss = float(mean)
    norm = optimiser.clip_gradients(clip)
    for name, value in (("loss", loss), ("norm of the gradients", norm)):
        if not math.isfinite(value):
            raise LossNotFinite(f"the {name} became {value}")
    optimiser.step(rate)
    return loss, norm


def backward(loss: Tensor) -> None:
    """Add the gradients of a loss to those that are there."""
    loss.backward()  # type: ignore[no-untyped-call]


def loss_of(model: Any, task: Any, piece: Sequence[Item]) -> Tensor:
    """The task's mean loss over some examples: a scalar with a graph."""
    sources = [item.source for item in piece]
    targets = [item.target for item in piece if item.target is not None]
    with mixed_precision(model):
        if targets:
            return _loss_of_targets(model, task, packed.target_states(model, sources, targets), torch.cat(targets))
        logits = packed.classify_logits(model, sources)  # (B, C)
        wanted = task.targets([item.example for item in piece])  # (B,) or (B, C)
        loss: Tensor = task.loss(logits, wanted.to(logits.device))
        return loss


def _loss_of_targets(model: Any, task: Any, states: Tensor, wanted: Tensor) -> Tensor:
    """The mean over N targets, TARGETS at a time: logits of a large vocabulary are made again and never all there.

    states: (N, D), wanted: (N,) int64.
    """
    wanted = wanted.to(states.device)

    def part(some: Tensor, of_them: Tensor) -> Tensor:
        mean: Tensor = task.loss(packed.vocabulary_logits(model, some), of_them)
        return mean * (len(of_them) / len(wanted))

    parts = list(zip(torch.split(states, TARGETS), torch.split(wanted, TARGETS), strict=True))
    if len(parts) == 1:
        return part(*parts[0])
    return torch.stack([cast(Tensor, checkpoint(part, *each, use_reentrant=False)) for each in parts]).sum()


_NO_MEMORY = ("out of memory", "not enough memory", "allocate memory", "DefaultCPUAllocator", "bad_alloc")


def memory_ran_out(error: Exception) -> bool:
    """Whether an error of Python or torch means that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)


@contextmanager
def explained(most_tokens: int, batch: Sequence[Item], step: int, predicted: Prediction | None) -> Iterator[None]:
    """Turns whatever torch raises when memory runs out into OutOfMemory, with the setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        pieces = micro_batches(batch, most_tokens)
        most = max(sum(item.tokens for item in piece) for piece in pieces)
        longest = max(item.tokens for item in batch)
        if most > longest:
            remedy = f"set train.micro_batch_tokens to {max(longest, most // 2)} (now {most_tokens})"
        else:
            remedy = f"lower task.max_tokens (this text alone has {longest} tokens)"
        plan = f"; the plan predicted {predicted}" if predicted else ""
        raise OutOfMemory(f"out of memory at step {step}, in a pass of {most} tokens: {remedy}{plan}") from error
