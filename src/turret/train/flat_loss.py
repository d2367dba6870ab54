"""Has a training learnt anything? Compares its latest losses with the loss of guessing. Loads no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

WINDOW, FEWEST = 50, 20  # latest steps that are looked at, and how many there must be
ERRORS = 2.0  # standard errors below the level that are more than noise,
SHARE = 0.01  # and this share of the level


@dataclass(frozen=True)
class FlatLoss:
    """Losses that lie at the level of guessing."""

    loss: float  # mean of the latest steps
    guessing: float  # what answering with the shares of the classes has

    def __str__(self) -> str:
        return f"the training loss lies at {self.loss:.3f}, and guessing has {self.guessing:.3f}"

    def warning(self) -> str:
        return (
            f"nothing was learnt: {self}; leave train.lr out, take more epochs or examples, or another method "
            "(turret plan says what is usual)"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def flat_loss(latest: Sequence[float], guessing: float | None) -> FlatLoss | None:
    """Whether the latest losses of a training are no better than guessing.

    They are where their mean is not below `guessing` by two standard errors, and by one percent.

    Args:
        latest: the loss of every step, the last WINDOW of them or all there are.
        guessing: None where a task has no such level.
    """
    losses = latest[-WINDOW:]
    if guessing is None or len(losses) < FEWEST:
        return None
    mean = statistics.fmean(losses)
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    below = max(ERRORS * error, SHARE * guessing)
    return FlatLoss(mean, guessing) if mean > guessing - below else None
