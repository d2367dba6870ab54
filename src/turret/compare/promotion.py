"""Which version to promote after a comparison, and why. Knows rows and verdicts, as `comparison` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turret.compare.results import Result


@dataclass(frozen=True)
class Promotion:
    """What to do with all this."""

    spec: str | None
    version: str | None
    why: str


def promotion(rows: Sequence[Any], against: str, whole: Sequence[Result]) -> Promotion:
    """The smallest of those as good as the yardstick; a seed is chosen by validation, never by the test examples."""
    good = [row for row in rows if row.verdict and row.verdict.word in ("within", "better") and row.versions]
    if any(row.spec == against and row.learnt_nothing for row in rows):
        return Promotion(None, None, f"{against} learnt nothing here, so to be as good as it says nothing")
    if good:
        chosen = min(good, key=lambda row: (row.costs.bundle_bytes if row.costs else 0, row.spec))
        why = f"the smallest of those as good as {against}" if len(good) > 1 else f"as good as {against}, and smaller"
    else:
        yard = [row for row in rows if row.spec == against and row.versions]
        judged = [row for row in rows if row.verdict is not None and row.kind != "base"]
        if not yard:
            return Promotion(None, None, f"{against} has not run, so nothing can be judged yet")
        if not judged:
            return Promotion(None, None, f"nothing beside {against} has run yet")
        if any(row.verdict and row.verdict.word == "undecided" for row in judged):
            return Promotion(None, None, f"nothing is shown to be as good as {against} yet: {_advice(judged)}")
        chosen, why = yard[0], "every other method is worse by more than the margin"
    mine = [each for each in whole if each.spec == chosen.spec and each.version is not None]
    measured = [each for each in mine if each.held.get("validation")]
    if measured:
        best = max(measured, key=lambda each: _merit(each.held["validation"]))
        return Promotion(chosen.spec, best.version, f"{why}; of its seeds the best on the validation split")
    return Promotion(chosen.spec, mine[0].version, f"{why}; its first seed, because the test examples choose nothing")


def _merit(metrics: Mapping[str, Any]) -> float:
    return float(metrics.get("accuracy", -metrics["loss"]))


def _advice(rows: Sequence[Any]) -> str:
    asked = [row.verdict for row in rows if row.verdict and row.verdict.word == "undecided"]
    few = [each.more_seeds for each in asked if each.more_seeds is not None]
    if not few:
        return str(asked[0].advice())
    return f"about {min(few)} more seed{'' if min(few) == 1 else 's'} would settle the first of them"
