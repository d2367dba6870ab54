"""The rows of a comparison: one per method with its settings, and one per method and number of training examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turret.compare.candidates import UNTRAINED
from turret.compare.collapse import Collapse
from turret.compare.evidence import Interval
from turret.compare.results import Costs
from turret.compare.verdict import Verdict


@dataclass(frozen=True)
class ComparisonRow:
    """One method with its settings, over all its seeds on all training examples."""

    spec: str
    label: str
    kind: str  # full, lora, prefix, head, peft, or of a row that trains nothing
    lr: float | None
    seeds: tuple[int, ...]
    versions: tuple[str, ...]
    score: Interval | None  # points of the metric, over seeds that did not collapse; None: nothing has run
    metrics: Mapping[str, float]  # means over the seeds that did not collapse
    verdict: Verdict | None  # None for the baseline
    mcnemar: tuple[tuple[int, int, float], ...]  # per seed: (only this right, only the baseline right, exact p)
    costs: Costs | None
    failed: str | None
    collapses: tuple[Collapse, ...] = ()  # trainings that learnt nothing while others of this method did
    learnt_nothing: bool = False  # every seed is at the level of guessing
    trained_out: bool | None = None  # False: the loss still fell at the last step of half of the trainings or more
    steps: int | None = None  # of each training, the mean over seeds; None: nothing was trained
    at_equal_steps: Verdict | None = None  # against the baseline trained for as many steps, where its own differ
    losses: tuple[tuple[int, tuple[float, ...]], ...] = ()  # per seed: training losses, means over equal stretches

    @property
    def trains(self) -> bool:
        """Whether trainings make it."""
        return self.kind not in UNTRAINED

    @property
    def marks(self) -> tuple[str, ...]:
        """Warnings to show next to the score."""
        marks = [f"{len(self.collapses)} of {len(self.seeds)} collapsed"] if self.collapses else []
        marks += ["learnt nothing"] if self.learnt_nothing else []
        return (*marks, *(["not trained out"] if self.trained_out is False else []))


@dataclass(frozen=True)
class CurvePoint:
    """One method on a part of the training examples."""

    spec: str
    fraction: float
    examples: int
    score: Interval
    seeds: int
    word: str | None
