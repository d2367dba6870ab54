"""The options of a prediction, and whether a version gives what they ask for. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from turret.errors import AdapterError, DataError
from turret.json_types import JsonMapping
from turret.store import Version
from turret.tasks import stored_task
from turret.tasks.calibration import Calibration, require


@dataclass(frozen=True)
class PredictOptions:
    """The options of a prediction.

    Args:
        columns: keys of a recipe's `[data]`, such as {"text": "body"}, which override those of the version's training.
        bare: ask the base without the adapter.
        top: the number of labels to write, the most probable first.
        coverage: also write sets of labels with this coverage.
        device: where the base computes.
    """

    columns: JsonMapping = field(default_factory=dict)
    bare: bool = False
    top: int = 1
    coverage: float | None = None
    device: str = "auto"


def check_options(version: Version, top: int, coverage: float | None) -> None:
    """Check before anything is loaded that the version gives what these options ask for."""
    if top < 1:
        raise DataError(f"--top {top}: expected 1 or more")
    task = stored_task(version.part("task"))
    if top > 1 and (task.generates or not task.calibrates):
        raise AdapterError(f"{version} gives no probability of labels, which --top {top} needs: ask it without --top")
    if coverage is not None:
        require_coverage(version, coverage)


def require_coverage(version: Version, coverage: float) -> None:
    """Check before anything is loaded that a version gives sets of labels with this coverage.

    Raises:
        AdapterError: it has no calibration, or it generates text.
        DataError: its validation examples are too few for this coverage.
    """
    spec = version.part("task")
    task, fitted = stored_task(spec), spec.get("calibration")
    if task.generates or not task.calibrates:
        raise AdapterError(f"{version} gives no probability of labels: ask it without coverage")
    require(None if fitted is None else Calibration.from_json(fitted), str(version)).threshold(coverage)


def ranked_labels(answer: JsonMapping) -> list[tuple[str, float]]:
    """The labels of an answer with their probabilities, the most probable first; none for a text."""
    probabilities = answer.get("probabilities")
    if not isinstance(probabilities, Mapping):
        return []
    return sorted(((str(label), float(p)) for label, p in probabilities.items()), key=lambda each: -each[1])
