"""What trains on a base and answers, verb by verb: the types, without torch.

The verbs are those of Tinker's API. An engine makes the slots; training loops, workers and servers are their clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from turret.tasks.shapes import Answer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.adapters.adapter import Adapter
    from turret.data import Input
    from turret.engine.request import Ticket
    from turret.engine.sampling_params import SamplingParams

Row = TypeVar("Row", contravariant=True)  # an example as a task has it, or encoded


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


class TrainsRows(Protocol[Row]):
    """An adapter that trains. A loss is a mean over the rows, or over the tokens that it counts."""

    @property
    def steps(self) -> int:
        """Steps taken so far."""

    def forward(self, rows: Sequence[Row]) -> float:
        """The task's loss over some rows, without gradients and dropout."""

    def forward_backward(self, rows: Sequence[Row], loss: Loss | None = None) -> float:
        """Add the gradients of a loss over some rows. Returns that loss. loss: None: the task's."""

    def optim_step(self, step: OptimStep) -> float:
        """One step with the gradients that were added. Returns their norm before clipping.

        Raises:
            TrainingError: No gradients were added since the last step.
            LossNotFinite: The norm is NaN or infinite; the weights stay, the gradients are dropped.
        """

    def save(self) -> Adapter:
        """The adapter as it is now, ready for `bundles.save_bundle`."""

    def load(self, adapter: Adapter) -> None:
        """Continue from the tensors of a finished adapter. Raises AdapterError if they do not fit."""

    def drop(self) -> None:
        """Free the slot, once its answers have ended."""


class Samples(Protocol):
    """An adapter that answers as it is now, without a file between. A request keeps the weights that it began with."""

    def sample(self, inputs: Sequence[Input], options: SamplingParams | None = None) -> list[Answer]:
        """An answer for each input."""

    def submit(self, inputs: Sequence[Input], options: SamplingParams | None = None) -> list[Ticket]:
        """The tickets of these answers."""
