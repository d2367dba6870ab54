"""The trackers that a recipe can name, and whether their libraries are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from turret.errors import RecipeError


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
