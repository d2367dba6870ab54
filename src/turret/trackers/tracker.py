"""The protocol of a tracker, and the data about a run that it gets. Loads no tracking library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

State = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """A training run, as every tracker gets it at its start."""

    id: str  # of the run in the store; the same after a resume
    name: str  # of the adapter
    folder: str  # of the run, for trackers that write files
    after: int  # the step after which this process goes on; 0: it starts the run
    settings: Mapping[str, float | str]  # the recipe's keys and what the run was made from, such as train.lr
    texts: Mapping[str, str]  # by file name: the recipe as TOML, the plan as JSON


class Point(NamedTuple):
    """The numbers of one step."""

    step: int
    values: Mapping[str, float]  # such as train/loss and validation/accuracy


class Tracker(Protocol):
    """One run in a tracking program. Made and called in one process and one thread; any exception is an outage."""

    def start(self, run: TrackedRun) -> None:
        """Begin the run, or continue it if a run of that id is there already."""

    def log(self, points: Sequence[Point]) -> None:
        """Add the numbers of some steps, in order. After a resume, steps may come again."""

    def finish(self, state: State, summary: Mapping[str, float | str]) -> None:
        """End the run.

        Args:
            summary: the final metrics, and the version and its digest if one was stored.
        """
