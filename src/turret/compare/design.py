"""Which trainings a comparison is made of, and in which order. Knows recipes, seeds and sizes; runs nothing.

All trainings of a comparison share the data, the split (`data.seed`), the steps and the evaluation; they differ in
method, seed and, for learning curves, in how many of the same training examples they see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from turret.compare.candidates import Candidate
from turret.compare.power import Power
from turret.errors import RecipeError
from turret.recipe import Recipe

MOST_SEEDS = 100


@dataclass(frozen=True)
class Cell:
    """One training of the comparison, or one look at the base."""

    candidate: Candidate
    seed: int
    fraction: float  # of the training examples
    recipe: Recipe

    @property
    def key(self) -> str:
        """The name of its folder: readable, and another one whenever its recipe is another."""
        digest = hashlib.sha256(f"{self.candidate.kind}\n{self.recipe.to_toml()}".encode()).hexdigest()
        return f"{self.candidate.slug}-seed{self.seed}-{self.fraction:g}-{digest[:8]}"

    def __str__(self) -> str:
        part = "" if self.fraction == 1 else f", {100 * self.fraction:g}% of the training examples"
        return f"{self.candidate.label}, seed {self.seed}{part}"


@dataclass(frozen=True)
class Design:
    """The whole comparison before anything has run."""

    recipe: Recipe
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    fractions: tuple[float, ...]  # largest first
    against: str  # spec of the row that the others are judged against
    margin: float  # points
    train: int  # training examples at fraction 1

    def cells(self) -> Iterator[Cell]:
        """In the order they run: all methods of a seed, then the next, so that rows are even whenever it stops."""
        for seed in self.seeds:
            for fraction in self.fractions:
                for candidate in self.candidates:
                    if candidate.kind != "base" or fraction == self.fractions[0]:
                        yield Cell(candidate, seed, fraction, self._recipe(candidate, seed, fraction))

    def _recipe(self, candidate: Candidate, seed: int, fraction: float) -> Recipe:
        data = {"seed": self.recipe.split_seed}
        if fraction < 1:
            data["train"] = max(1, round(fraction * self.train))
        made = candidate.recipe
        return made.model_copy(update={"seed": seed, "data": made.data.model_copy(update=data)})


@dataclass(frozen=True)
class PlannedDesign:
    """A comparison before its trainings: what there will be, and which difference it can decide."""

    name: str
    methods: tuple[str, ...]
    against: str
    trainings: int
    missing: int  # of them
    power: Power
    folder: str

    def as_json(self) -> dict[str, Any]:
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
) -> Design:
    """A design that makes sense; raises RecipeError for one that does not."""
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
    sized = [row for row in rows if row.kind != "base"]
    judged = [row.spec for row in rows if row.spec == against] or [row.spec for row in rows if row.kind == against]
    if not judged:
        raise RecipeError(
            f"verdicts are against {against}, which is not among the methods: add it to --methods, "
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
    )
