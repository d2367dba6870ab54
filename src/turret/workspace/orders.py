"""Comparisons and sweeps as they are asked for, and as they wait in the queue. Loads neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from turret.errors import RecipeError
from turret.json_types import JsonObject
from turret.recipe import Recipe
from turret.store.jobs import StudySpec

if TYPE_CHECKING:
    from turret.compare.design import PlannedDesign
    from turret.workspace.sweeping import SweepRequest

MOST_CELLS = 500
SEARCHED = ("method.", "train.")  # settings that a client may search; no other could name a file or a tracker
NOT_SEARCHED = ("method.kind", "train.init_from", "train.trackers")


@dataclass(frozen=True)
class ComparisonRequest:
    """The options of a comparison."""

    methods: str | None = None  # None: base, the task's baselines, full, lora and prefix
    seeds: int = 5
    budget: float | None = None  # seconds; None: until all cells have run
    fractions: tuple[float, ...] = (1.0,)  # of the training examples
    margin: float = 1.0  # points
    against: str = "full"
    lr: float | Literal["auto"] | None = None  # for every method; None: each method's own
    texts: bool = True  # whether the report shows examples
    confidence: float = 0.95


@dataclass(frozen=True)
class SweepOrder:
    """A sweep that waits: as `Workspace.sweep` takes it."""

    settings: Mapping[str, str]
    trials: int | None = None
    at_once: int = 4
    budget: float | None = None

    def split(self, recipe: Recipe) -> tuple[Recipe, SweepRequest]:
        """The recipe with the settings that are fixed, and what is searched. Raises RecipeError."""
        from turret.workspace import sweeping  # imports numpy

        for key in self.settings:
            if not key.startswith(SEARCHED) or key.startswith(NOT_SEARCHED):
                raise RecipeError(f"a sweep searches settings of method and train, such as train.lr: given {key[:60]}")
        fixed, searched = sweeping.parse_settings(self.settings)
        for key, each in searched.items():
            texts = each.values if isinstance(each, sweeping.Choices) else (f"{each.low:g}", f"{each.high:g}")
            for text in texts:
                recipe.with_overrides({**fixed, key: text})  # a value that does not fit
        request = sweeping.SweepRequest(searched, self.trials, self.at_once, self.budget)
        if request.count > MOST_CELLS:
            raise RecipeError(
                f"{request.count} trials: expected at most {MOST_CELLS}: give fewer values, or fewer trials"
            )
        return recipe.with_overrides(fixed), request


Order: TypeAlias = ComparisonRequest | SweepOrder


def as_spec(order: Order, sent: str) -> StudySpec:
    """For the row of its job. sent: the data, as the client named it."""
    verb = "sweep" if isinstance(order, SweepOrder) else "compare"
    return {"verb": verb, "sent": sent, "order": asdict(order)}


def order_of(spec: StudySpec) -> Order:
    """What `as_spec` wrote."""
    values: JsonObject = dict(spec["order"])
    if spec["verb"] == "sweep":
        return SweepOrder(**values)
    return ComparisonRequest(**values | {"fractions": tuple(values["fractions"])})


def require_few(planned: PlannedDesign) -> None:
    """Raise RecipeError if a comparison has too many cells for a row of the queue."""
    if planned.trainings > MOST_CELLS:
        raise RecipeError(
            f"{planned.trainings} cells: expected at most {MOST_CELLS}: give fewer methods, seeds or sizes"
        )
