"""What the trackers of `[train] trackers` are told about a training: its settings, each step, its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from turret.errors import Interrupted
from turret.json_types import JsonMapping, JsonValue
from turret.recipe import Recipe
from turret.trackers.tracker import State, TrackedRun
from turret.trackers.tracking import Tracking
from turret.workspace.results import RunResult

if TYPE_CHECKING:
    from turret.train import StepRecord

STEP = ("loss", "lr", "grad_norm", "epoch", "tokens_per_second")  # fields of a record, as train/<field>


class Followed:
    """A training with its trackers; without any, all methods do nothing."""

    def __init__(self, tracking: Tracking | None) -> None:
        self._tracking = tracking
        self._result: RunResult | None = None

    def record(self, record: StepRecord) -> None:
        """A step has ended."""
        if self._tracking is not None:
            self._tracking.log(record.step, values_of(record))

    def finished(self, result: RunResult) -> None:
        """A version is stored."""
        self._result = result

    @property
    def warnings(self) -> list[str]:
        """The outages so far, a line each."""
        return [] if self._tracking is None else self._tracking.warnings

    def end(self, state: State) -> None:
        """End the run in all trackers."""
        if self._tracking is not None:
            self._tracking.end(state, {} if self._result is None else summary_of(self._result))


@contextmanager
def follow(recipe: Recipe, run: TrackedRun | None, warn: Callable[[str], None]) -> Iterator[Followed]:
    """Start the trackers that a recipe names, and end them with the state in which the training ends.

    Args:
        run: None if the recipe names no tracker.
        warn: gets a line when a tracker fails.
    """
    names = recipe.train.trackers or ()
    followed = Followed(Tracking(names, run, warn) if names and run is not None else None)
    try:
        yield followed
    except BaseException as error:
        followed.end("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed")
        raise
    followed.end("finished")


def settings_of(recipe: Recipe, facts: Mapping[str, float | str]) -> dict[str, float | str]:
    """A recipe's settings by key (train.lr, method.r, ...), and the facts. Settings that are not set are left out."""
    found: dict[str, float | str] = {}
    for key, value in recipe.without_trackers().model_dump(mode="json").items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        found |= {f"{key}.{name}".rstrip("."): _plain(each) for name, each in parts if each is not None}
    return found | dict(facts)


def values_of(record: StepRecord) -> dict[str, float]:
    """The numbers of a step, such as train/loss, and those of an evaluation after it, such as validation/accuracy."""
    values = {f"train/{name}": float(getattr(record, name)) for name in STEP}
    return values | {f"{record.split}/{name}": value for name, value in _numbers(record.metrics or {})}


def summary_of(result: RunResult) -> dict[str, float | str]:
    """The final metrics, such as test/accuracy, and the version with its digest."""
    summary: dict[str, float | str] = {"version": result.version, "digest": result.digest}
    for split, metrics in result.metrics.items():
        summary |= {f"{split}/{name}": value for name, value in _numbers(metrics)}
    summary |= {f"forgetting/{name}": value for name, value in _numbers(result.forgetting or {})}
    return summary | {"train_seconds": float(result.timing["train_seconds"])}


def _numbers(metrics: JsonMapping) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, float(value)


def _plain(value: JsonValue) -> float | str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return value
    return json.dumps(value, ensure_ascii=False)
