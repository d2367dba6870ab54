"""`lr = "auto"`: which learning rates are tried, and which is taken. Policy alone: knows scores, no model and no torch.

    3, 10, 30   or else   1/3, 1/10, 1/30   times the default, outward for as long as a rate is better than the last

Factors of three are as fine as short trials can tell rates apart. Better means by two standard errors of the paired
difference over the examples that score. Trials are sequential, because several adapters in one pass gain little (1.24
times at four, on short texts only).

A short trial flatters large rates: they go far before they grow noisy, and the best rate falls about as one over the
root of the number of steps. A trial has a fifth of the run's steps, so the run's best rate is a factor of two or three
below the trial's, and a rate above the default is taken only if the next one up did no worse. (BBC News: the best trial
of 15 steps is at 1e-2, where the run of 150 steps ends at chance; at the 3e-3 below it the run beats the default.)
A rate below the default that wins such a trial has won against the odds, and is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

AUTO = "auto"  # what a recipe says instead of a rate
UPWARD, DOWNWARD = (3.0, 10.0, 30.0), (1 / 3, 1 / 10, 1 / 30)  # times the default
MOST_TRIALS = 2 + len(DOWNWARD)  # the default, one above it, all below
SHARE = 0.2  # of the run's steps in a trial,
FEWEST_STEPS, MOST_STEPS = 10, 100  # but so many; LoRA on 200 snippets leaves guessing after about 50
FEWEST_TIMES = 4  # the fewest steps a trial has, this often, a run must have
HELD_SHARE = 0.2  # of the training examples score and are not trained on in a trial,
FEWEST_HELD, MOST_HELD = 16, 128  # but so many
ERRORS = 2.0  # standard errors that are more than noise


@dataclass(frozen=True)
class Score:
    """How a trial did: the loss of every example (summed over its target tokens), and the terms each counts for."""

    losses: tuple[float, ...]
    weights: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.losses) / sum(self.weights)

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.losses))


def better(one: Score | None, other: Score | None) -> bool:
    """Whether `one` is lower by more than noise; a trial that diverged (None) is worse than any that did not.

    delta = sum d / sum w,   error^2 = n / (n - 1) sum (d - w delta)^2 / (sum w)^2      for d = other's loss - one's
    """
    if one is None or other is None:
        return one is not None
    differences = [b - a for a, b in zip(one.losses, other.losses, strict=True)]
    total, count = sum(one.weights), len(differences)
    delta = sum(differences) / total
    spread = sum((d - w * delta) ** 2 for d, w in zip(differences, one.weights, strict=True))
    return delta > ERRORS * math.sqrt(spread * count / (count - 1)) / total


def search(default: float, score: Callable[[float], Score | None]) -> tuple[float, dict[float, Score | None]]:
    """(the rate to take, the score of every rate tried, the default first)."""
    scores = {default: score(default)}

    def climb(factors: Sequence[float]) -> tuple[list[float], bool]:
        """The rates that were each better than the one before, and whether the next was not worse than the last."""
        path = [default]
        for lr in (default * factor for factor in factors):
            scores[lr] = score(lr)
            if scores[lr] is None and scores[path[-1]] is None:
                continue
            if not better(scores[lr], scores[path[-1]]):
                return path, not better(scores[path[-1]], scores[lr])
            path.append(lr)
        return path, False

    if scores[default] is None:  # not a rate right below one that diverges, where there is another
        down, _ = climb(DOWNWARD)
        return min((lr for lr, found in scores.items() if found is not None), default=down[-1]), scores
    up, flat = climb(UPWARD)
    if len(up) > 1:
        return (up[-1] if flat else up[-2]), scores
    return (default if flat else climb(DOWNWARD)[0][-1]), scores


@dataclass(frozen=True)
class Size:
    """How long a trial is and how many examples score it; with a reason, there is none."""

    steps: int
    held: int
    reason: str | None = None


def size_of(examples: int, steps: int) -> Size:
    """From the training examples and the steps of the run."""
    held = min(MOST_HELD, int(HELD_SHARE * examples))
    if steps < FEWEST_TIMES * FEWEST_STEPS:
        return Size(0, 0, f"{steps} steps are too few to try rates first, {FEWEST_TIMES * FEWEST_STEPS} are enough")
    if held < FEWEST_HELD:
        enough = math.ceil(FEWEST_HELD / HELD_SHARE)
        return Size(0, 0, f"{examples} training examples are too few to compare rates on, {enough} are enough")
    return Size(max(FEWEST_STEPS, min(MOST_STEPS, round(SHARE * steps))), held)


@dataclass(frozen=True)
class Found:
    """The rate to train with, and how it was found."""

    lr: float
    default: float
    size: Size
    losses: dict[float, float | None]  # rate -> held-back loss after its trial, None where it diverged; rising

    def to_json(self) -> dict[str, Any]:
        tried = [{"lr": lr, "loss": loss} for lr, loss in self.losses.items()]
        return {"lr": self.lr, "default": self.default, **asdict(self.size), "tried": tried}

    def __str__(self) -> str:
        """For the plan: `0.003, found by trying 3 rates for 20 steps each (held-back loss 0.41, 0.47 at ...)`."""
        if self.size.reason is not None:
            return f"{self.lr:.3g}, this method's own: {self.size.reason}"
        tried = f"trying {len(self.losses)} rates for {self.size.steps} steps each"
        loss = _number(self.losses[self.lr])
        if self.lr == self.default:
            return f"{self.lr:.3g}, this method's own: {tried} found none to take instead (held-back loss {loss})"
        than = f"{_number(self.losses[self.default])} at the default {self.default:.3g}"
        return f"{self.lr:.3g}, found by {tried} (held-back loss {loss}, {than})"

    def note(self) -> str:
        """The whole table, in one line."""
        pairs = ", ".join(f"{lr:.3g}: {_number(loss)}" for lr, loss in self.losses.items())
        how = f"{self.size.steps} steps each, loss on {self.size.held} training examples held back from them"
        return f"learning rates tried ({how}): {pairs}" if pairs else f"learning rate {self}"


def _number(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4g}"
