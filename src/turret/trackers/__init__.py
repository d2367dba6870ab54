"""Trackers show a training while it runs: Trackio, MLflow, Weights & Biases and TensorBoard, each by an extra.

Each tracker runs in a process of its own, so that one that fails, hangs or prints never touches the training. Its
library is imported in that process only, and only if the recipe names the tracker.

The trackers of `accelerate.tracking` are not used. They load torch into each of these processes, cannot find a run of
MLflow again by its id, and end every run as finished, also one that failed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from turret.errors import RecipeError

# --- tracker ----------------------------------------------------------------------------------------------------------
# The protocol of a tracker, and the data about a run that it gets. Loads no tracking library.


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


# --- table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tracker that a recipe can name."""

    at: str  # module:class
    library: str  # the package that the class imports


TRACKERS: dict[str, Entry] = {
    "trackio": Entry("turret.trackers.trackio:Trackio", "trackio"),
    "mlflow": Entry("turret.trackers.mlflow:MLflow", "mlflow"),
    "wandb": Entry("turret.trackers.wandb:WandB", "wandb"),
    "tensorboard": Entry("turret.trackers.tensorboard:TensorBoard", "tensorboard"),
}


def require_installed(names: Iterable[str], table: Mapping[str, Entry] = TRACKERS) -> None:
    """Raise RecipeError for a tracker whose library is not installed. Imports nothing."""
    missing = [name for name in names if not _installed(table[name].library)]
    if missing:
        raise RecipeError(
            f"train.trackers names {missing[0]!r}, whose library is not installed: "
            f"pip install 'turret[{','.join(missing)}]', or leave it out"
        )


def _installed(library: str) -> bool:
    """Whether a package of that name can be imported. A folder of results called like the library is none."""
    try:
        found = importlib.util.find_spec(library)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None
