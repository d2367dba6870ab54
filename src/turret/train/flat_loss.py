"""Tells whether a training has learnt anything, by comparing its latest losses with the loss of guessing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW, FEWEST = 50, 20  # latest steps that count, and the fewest that are enough to tell
ERRORS = 2.0  # standard errors; a smaller distance from `guessing` is noise
SHARE = 0.01  # of `guessing`; a smaller distance is too little


@dataclass(frozen=True)
class FlatLoss:
    """A training whose latest losses are no better than guessing."""

    loss: float  # mean of the latest steps
    guessing: float  # the loss of answering with the shares of the classes, whatever the text
    remedy: str = "use more examples, or another method"

    def __str__(self) -> str:
        return f"the training loss is {self.loss:.3f}, no better than guessing ({self.guessing:.3f})"

    def warning(self) -> str:
        """The finding with its remedy, in one line."""
        return f"nothing was learnt: {self}; {self.remedy}"

    def to_json(self) -> dict[str, float]:
        return {"loss": self.loss, "guessing": self.guessing}


def flat_loss(latest: Sequence[float], guessing: float | None) -> FlatLoss | None:
    """A `FlatLoss` if the latest losses are no better than guessing, else None.

    Better means a mean that is below `guessing` by more than two standard errors and by more than one percent.

    Args:
        latest: the losses of the steps so far; the last WINDOW of them count.
        guessing: the loss of guessing; None if the task has none.
    """
    losses = latest[-WINDOW:]
    if guessing is None or len(losses) < FEWEST:
        return None
    mean = statistics.fmean(losses)
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    return FlatLoss(mean, guessing) if mean > guessing - max(ERRORS * error, SHARE * guessing) else None
