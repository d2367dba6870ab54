"""Recommends which version to promote after a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turret.compare.results import CellResult
from turret.compare.rows import ComparisonRow
from turret.compare.verdict import Verdict
from turret.json_types import JsonMapping


@dataclass(frozen=True)
class Promotion:
    """The version to promote, or why there is none."""

    spec: str | None
    version: str | None
    why: str


def promotion(rows: Sequence[ComparisonRow], against: str, results: Sequence[CellResult]) -> Promotion:
    """The smallest method that is as good as the baseline. The validation split chooses its seed, never the test split.

    If the baseline learnt nothing, only a method that is better than it counts.

    Args:
        against: spec of the baseline.
        results: on all training examples, without those that collapsed.
    """
    good = [row for row in rows if row.verdict and row.verdict.word in ("within", "better") and row.versions]
    if any(row.spec == against and row.learnt_nothing for row in rows):
        good = [row for row in good if row.verdict and row.verdict.word == "better" and not row.learnt_nothing]
        if not good:
            return Promotion(None, None, f"{against} learnt nothing here, so being as good as {against} means nothing")
        chosen = min(good, key=lambda row: (row.costs.bundle_bytes if row.costs else 0, row.spec))
        why = f"{'the smallest method ' if len(good) > 1 else ''}better than {against}, which learnt nothing"
    elif good:
        chosen = min(good, key=lambda row: (row.costs.bundle_bytes if row.costs else 0, row.spec))
        why = f"the smallest method as good as {against}" if len(good) > 1 else f"as good as {against}, and smaller"
    else:
        baseline = next((row for row in rows if row.spec == against and row.score is not None), None)
        verdicts = [row.verdict for row in rows if row.verdict is not None and row.trains]
        undecided = [verdict for verdict in verdicts if verdict.word == "undecided"]
        if baseline is None:
            return Promotion(None, None, f"{against} has not run, so nothing can be judged yet")
        if not verdicts:
            return Promotion(None, None, f"no method but {against} has run yet")
        if undecided:
            return Promotion(None, None, f"nothing is shown to be as good as {against} yet: {_advice(undecided)}")
        if not baseline.versions:
            return Promotion(None, None, f"every method is worse than {against}, which is no version")
        chosen, why = baseline, "every other method is worse by more than the margin"
    own = [each for each in results if each.spec == chosen.spec and each.version is not None]
    validated = [each for each in own if each.held.get("validation")]
    if validated:
        best = max(validated, key=lambda each: _merit(each.held["validation"]))
        return Promotion(chosen.spec, best.version, f"{why}; of its seeds the best on the validation split")
    return Promotion(chosen.spec, own[0].version, f"{why}; its first seed, because the test examples must not choose")


def not_promoted(composition: str) -> Promotion:
    """What is said of a composition: it has no number of its own that an alias could name."""
    why = f"a composition is no version: ask for it by its name, {composition}, or merge its LoRAs into a version"
    return Promotion(None, None, why)


def _merit(metrics: JsonMapping) -> float:
    return float(metrics.get("accuracy", -metrics["loss"]))


def _advice(undecided: Sequence[Verdict]) -> str:
    by_seeds = [each for each in undecided if each.more_seeds is not None and each.more_examples is None]
    return min(by_seeds, key=lambda each: each.more_seeds or 0).advice() if by_seeds else undecided[0].advice()
