"""What a step of a training is told: its numbers, and a loss of your own. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OptimStep:
    """How one step of AdamW updates the weights. Each step may have other numbers.

    Args:
        lr: The learning rate.
        weight_decay: The share of the weights that a step at rate 1 takes away.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        clip: The largest norm of the gradients; None or 0: any.
    """

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0


@dataclass(frozen=True)
class Loss:
    """A loss of your own, instead of the task's: a mean that gradients are computed of.

    Args:
        name: In errors.
        function: Takes outputs and targets, gives a scalar. Of a task with a head: the logits (B, C), and what
            `task.targets` gives. Of a task that generates and a loss that spans a row: the logits (N, V) and the ids
            (N,) of some target tokens. If it spans the batch: the log-probability of each row's target (B,), and its
            number of tokens (B,).
        spans: "row": the mean of a loss that each row has alone. Micro-batches are computed one after another. "batch":
            a loss that compares rows with each other. All outputs are computed first, then each micro-batch again with
            gradients and the same dropout, so memory is that of one micro-batch.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    spans: Literal["row", "batch"] = "row"
