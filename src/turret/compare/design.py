"""The trainings of a comparison and their order.

All trainings share the data, the split (`data.seed`) and the evaluation. They differ in method, seed, epochs (each
method has its own number, unless the recipe sets one) and, for learning curves, in the number of training examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from turret.compare.candidates import Candidate
from turret.compare.power import Power
from turret.errors import RecipeError
from turret.json_types import JsonObject
from turret.recipe import Recipe

MOST_SEEDS = 100


@dataclass(frozen=True)
class Cell:
    """One training of the comparison, or one evaluation of the bare base."""

    candidate: Candidate
    seed: int
    fraction: float  # of the training examples
    recipe: Recipe
    content: str | None = None  # digest of its data; None: what `data.source` says tells the data

    @property
    def key(self) -> str:
        """The name of its folder, which depends on its recipe, and not on where its data lies if that has a digest."""
        recipe = self.recipe.without_trackers()
        if self.content is not None:
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": self.content})})
        text = recipe.to_toml()
        digest = hashlib.sha256(f"{self.candidate.kind}\n{text}".encode()).hexdigest()
        return f"{self.candidate.slug}-seed{self.seed}-{self.fraction:g}-{digest[:8]}"

    def __str__(self) -> str:
        part = "" if self.fraction == 1 else f", {100 * self.fraction:g}% of the training examples"
        return f"{self.candidate.label}, seed {self.seed}{part}"


@dataclass(frozen=True)
class Design:
    """The whole comparison, before anything has run."""

    recipe: Recipe
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    fractions: tuple[float, ...]  # largest first
    against: str  # spec of the baseline
    margin: float  # points
    train: int  # training examples at fraction 1
    twins: frozenset[str] = frozenset()  # specs of the rows that train the baseline for other methods' epochs
    composition: str | None = None  # whose parts are compared with it, as they are stored; None: trainings

    def cells(self) -> Iterator[Cell]:
        """The cells in the order in which they run: all methods of one seed first, so that an early stop is fair."""
        for seed in self.seeds:
            for fraction in self.fractions:
                for candidate in self.candidates:
                    if fraction == self.fractions[0] or (candidate.kind != "base" and not self.is_twin(candidate)):
                        yield Cell(candidate, seed, fraction, self._recipe(candidate, seed, fraction))

    def is_twin(self, candidate: Candidate) -> bool:
        """Whether a row is the baseline trained for another number of epochs."""
        return candidate.spec in self.twins

    def _recipe(self, candidate: Candidate, seed: int, fraction: float) -> Recipe:
        data = {"seed": self.recipe.split_seed}
        if fraction < 1:
            data["train"] = max(1, round(fraction * self.train))
        recipe = candidate.recipe
        return recipe.model_copy(update={"seed": seed, "data": recipe.data.model_copy(update=data)})


@dataclass(frozen=True)
class PlannedDesign:
    """A planned comparison: its trainings, and the difference that it can decide."""

    name: str
    methods: tuple[str, ...]
    against: str
    trainings: int
    missing: int  # trainings that have not run
    power: Power
    folder: str

    def as_json(self) -> JsonObject:
        """The plan as JSON."""
        return {**asdict(self), "power": self.power.as_json()}


def design(
    recipe: Recipe,
    rows: Sequence[Candidate],
    *,
    seeds: int,
    fractions: Sequence[float],
    against: str,
    margin: float,
    train: int,
    twins: Sequence[str] = (),
) -> Design:
    """A checked design. Raises RecipeError.

    Args:
        seeds: number of seeds, counted up from the recipe's.
        fractions: shares of the training examples.
        against: spec of the baseline; it must be one of the rows.
        margin: points.
        train: number of training examples at fraction 1.
        twins: specs of the rows that train the baseline for other methods' epochs.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise RecipeError(f"--seeds {seeds}: expected 1 to {MOST_SEEDS}, and at least 2 for a verdict")
    if not 0 < margin <= 50:
        raise RecipeError(f"--margin {margin:g}: expected points above 0 and at most 50, such as 1")
    wrong = [each for each in fractions if not 0 < each <= 1]
    if wrong or not fractions:
        raise RecipeError(
            f"--fractions {wrong[0] if wrong else ''}: expected shares of the training examples such as 0.1,0.25,1"
        )
    if len(set(fractions)) > 1 and isinstance(recipe.data.train, str):
        raise RecipeError(f"--fractions cannot take a part of the split {recipe.data.train!r}: leave data.train out")
    sized = [row for row in rows if row.trains]
    judged = [row.spec for row in rows if row.spec == against] or [row.spec for row in rows if row.kind == against]
    if not judged:
        raise RecipeError(
            f"the baseline is {against}, which is not among the methods: add it to --methods, "
            f"or say --against {sized[0].spec if sized else 'full'}"
        )
    return Design(
        recipe=recipe,
        candidates=tuple(rows),
        seeds=tuple((recipe.seed + place) % 2**32 for place in range(seeds)),
        fractions=tuple(sorted(set(fractions), reverse=True)),
        against=judged[0],
        margin=margin,
        train=train,
        twins=frozenset(twins),
    )
