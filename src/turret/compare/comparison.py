"""All results of a comparison, judged: rows with verdicts and costs, what each class says, where methods disagree, and
which version to promote. Refuses to know how any of it is shown, and what ran where.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from turret.compare.claims import Claim, claims
from turret.compare.costs import Costs, costs
from turret.compare.design import Design
from turret.compare.details import Confusion, Disagreement, PerClass, confusion, disagreements, per_class
from turret.compare.evidence import Array, Interval, interval, mcnemar
from turret.compare.results import Result
from turret.compare.verdict import Verdict, judge
from turret.errors import TrainingError


@dataclass(frozen=True)
class Row:
    """One method with its settings, over all its seeds on all training examples."""

    spec: str
    label: str
    kind: str  # base, head, full, lora, prefix
    lr: float | None
    seeds: tuple[int, ...]
    versions: tuple[str, ...]
    score: Interval | None  # points of the metric; None: nothing ran
    metrics: Mapping[str, float]  # means over seeds
    verdict: Verdict | None  # None for the row that the others are judged against
    mcnemar: tuple[tuple[int, int, float], ...]  # a seed: (only this right, only that right, exact p)
    costs: Costs | None
    failed: str | None


@dataclass(frozen=True)
class Point:
    """A row on a part of the training examples."""

    spec: str
    fraction: float
    examples: int
    score: Interval
    seeds: int
    word: str | None


@dataclass(frozen=True)
class Promotion:
    """What to do with all this."""

    spec: str | None
    version: str | None
    why: str


@dataclass(frozen=True)
class Comparison:
    """A comparison as it stands; `missing` trainings are still to be made."""

    name: str
    base: Mapping[str, Any]
    task: str
    metric: str  # accuracy or rougeL
    against: str
    margin: float
    confidence: float
    seeds: tuple[int, ...]
    data: Mapping[str, Any]
    rows: tuple[Row, ...]
    curves: tuple[Point, ...]
    overtaking: tuple[str, ...]  # a sentence a method: with how much data it is better, as good or worse
    claims: tuple[Claim, ...]
    classes: tuple[PerClass, ...]
    confusions: tuple[Confusion, ...]
    disagreements: tuple[Disagreement, ...]
    promotion: Promotion
    recipes: Mapping[str, str]  # spec -> TOML of its first seed
    notes: tuple[str, ...]
    missing: int
    budget: float | None
    folder: str

    def without_texts(self) -> Comparison:
        """The same for those who may not read the examples: the texts on which methods disagree are left out."""
        return replace(self, disagreements=(), notes=(*self.notes, "the texts of examples were left out"))

    def as_json(self) -> dict[str, Any]:
        said = asdict(self)
        for row, made in zip(self.rows, said["rows"], strict=True):
            if row.verdict is not None:
                made["verdict"]["sentence"] = row.verdict.sentence(self.against_label)
        return said | {"report": f"{self.folder}/report.html"}

    @property
    def against_label(self) -> str:
        return next((row.label for row in self.rows if row.spec == self.against), self.against)


def comparison(
    made: Design,
    data: Any,
    results: Sequence[Result],
    *,
    failures: Mapping[str, str],
    missing: int,
    confidence: float,
    budget: float | None,
    folder: str,
) -> Comparison:
    """Judge what there is. data: the data set, whose test examples the scores belong to."""
    bases = {result.base["fingerprint"] for result in results}
    if len(bases) > 1:
        raise TrainingError(f"the base changed between trainings of this comparison: delete {folder} and compare again")
    whole = [result for result in results if result.fraction == made.fractions[0]]
    yardstick = {result.seed: result for result in whole if result.spec == made.against}
    rows = tuple(
        _row(made, candidate, [each for each in whole if each.spec == candidate.spec], yardstick, failures, confidence)
        for candidate in made.candidates
    )
    classes = data.labels if data.kind == "classify" and isinstance(getattr(data.test[0], "label", None), str) else ()
    specs = [row.spec for row in rows if row.score is not None]
    first = results[0]
    points = tuple(_curves(made, results, confidence)) if len(made.fractions) > 1 else ()
    return Comparison(
        name=made.recipe.name,
        base=first.base,
        task=data.kind,
        metric="accuracy" if data.kind == "classify" else "rougeL",
        against=made.against,
        margin=made.margin,
        confidence=confidence,
        seeds=made.seeds,
        data={
            "source": made.recipe.data.source,
            "train": made.train,
            "validation": len(data.validation),
            "test": len(data.test),
            "labels": list(data.labels),
            "digest": data.digest,
            "split_seed": made.recipe.split_seed,
            "commonest": _commonest(data),
        },
        rows=rows,
        curves=points,
        overtaking=overtaking(points, rows, made.against),
        claims=claims(rows, made.against),
        classes=per_class(whole, yardstick, data, classes, confidence, made.recipe.split_seed) if classes else (),
        confusions=confusion(whole, data, classes, specs) if classes else (),
        disagreements=disagreements(whole, data, specs),
        promotion=_promotion(rows, made, whole),
        recipes={spec: next(each.recipe for each in whole if each.spec == spec) for spec in specs},
        notes=_notes(data, rows, made),
        missing=missing,
        budget=budget,
        folder=folder,
    )


def generator(seed: int, *words: object) -> np.random.Generator:
    """The same intervals for the same results: drawn from the split's seed and what is judged."""
    return np.random.default_rng([seed, zlib.crc32(repr(words).encode())])


def paired(first: Mapping[int, Result], second: Mapping[int, Result]) -> Array | None:
    """Differences of scores (S, N) over the seeds that both have; None where there are none."""
    seeds = sorted(first.keys() & second.keys())
    return np.stack([first[seed].scores - second[seed].scores for seed in seeds]) if seeds else None


def _row(
    made: Design,
    candidate: Any,
    own: Sequence[Result],
    yardstick: Mapping[int, Result],
    failures: Mapping[str, str],
    confidence: float,
) -> Row:
    spec, seed = candidate.spec, made.recipe.split_seed
    mine = {result.seed: result for result in own}
    d = None if spec == made.against else paired(mine, yardstick)
    verdict = None
    if d is not None:
        verdict = judge(d, made.margin, generator(seed, spec, "verdict"), confidence=confidence)
    tests = [
        mcnemar(mine[each].scores == 1, yardstick[each].scores == 1)
        for each in sorted(mine.keys() & yardstick.keys())
        if verdict is not None and mine[each].kind == "classify"
    ]
    score = None
    if own:
        scores = np.stack([result.scores for result in own])
        score = interval(scores, generator(seed, spec), confidence=confidence, between=(0, 1)).times(100)
    numbers = [key for key in (own[0].metrics if own else ()) if isinstance(own[0].metrics[key], (int, float))]
    return Row(
        spec=spec,
        label=candidate.label,
        kind=candidate.kind,
        lr=own[0].lr if own else None,
        seeds=tuple(mine),
        versions=tuple(each.version for each in own if each.version is not None),
        score=score,
        metrics={key: fmean(float(each.metrics[key]) for each in own) for key in numbers},
        verdict=verdict,
        mcnemar=tuple(tests),
        costs=costs(own) if own else None,
        failed=failures.get(spec),
    )


def _curves(made: Design, results: Sequence[Result], confidence: float) -> list[Point]:
    points = []
    for candidate in made.candidates:
        for fraction in sorted(made.fractions):
            own = {each.seed: each for each in results if each.spec == candidate.spec and each.fraction == fraction}
            if not own:
                continue
            yard = {each.seed: each for each in results if each.spec == made.against and each.fraction == fraction}
            rng = generator(made.recipe.split_seed, candidate.spec, fraction)
            scores = np.stack([each.scores for each in own.values()])
            d = None if candidate.spec == made.against else paired(own, yard)
            points.append(
                Point(
                    candidate.spec,
                    fraction,
                    max(1, round(fraction * made.train)),
                    interval(scores, rng, confidence=confidence, between=(0, 1)).times(100),
                    len(own),
                    None if d is None else judge(d, made.margin, rng, confidence=confidence).word,
                )
            )
    return points


WORDS = {"better": "better than", "within": "as good as", "worse": "worse than", "undecided": "undecided against"}


def overtaking(points: Sequence[Point], rows: Sequence[Row], against: str) -> tuple[str, ...]:
    """With how many training examples a method is ahead of the yardstick, level with it or behind, by verdict alone."""
    labels = {row.spec: row.label for row in rows}
    found = []
    for row in rows:
        said = [
            (word, [str(point.examples) for point in points if point.spec == row.spec and point.word == word])
            for word in WORDS
        ]
        parts = [f"{WORDS[word]} {labels[against]} with {', '.join(sizes)}" for word, sizes in said if sizes]
        if parts and row.kind != "base":
            found.append(f"{row.label}: {'; '.join(parts)} training examples")
    return tuple(found)


def _promotion(rows: Sequence[Row], made: Design, whole: Sequence[Result]) -> Promotion:
    """The smallest of those as good as the yardstick; a seed is chosen by validation, never by the test examples."""
    good = [row for row in rows if row.verdict and row.verdict.word in ("within", "better") and row.versions]
    if good:
        chosen = min(good, key=lambda row: (row.costs.bundle_bytes if row.costs else 0, row.spec))
        why = (
            f"the smallest of those as good as {made.against}"
            if len(good) > 1
            else f"as good as {made.against}, and smaller"
        )
    else:
        yard = [row for row in rows if row.spec == made.against and row.versions]
        judged = [row for row in rows if row.verdict is not None and row.kind != "base"]
        if not yard:
            return Promotion(None, None, f"{made.against} has not run, so nothing can be judged yet")
        if not judged:
            return Promotion(None, None, f"nothing beside {made.against} has run yet")
        if any(row.verdict and row.verdict.word == "undecided" for row in judged):
            return Promotion(None, None, f"nothing is shown to be as good as {made.against} yet: {_advice(judged)}")
        chosen, why = yard[0], "every other method is worse by more than the margin"
    mine = [each for each in whole if each.spec == chosen.spec and each.version is not None]
    measured = [each for each in mine if each.held.get("validation")]
    if measured:
        best = max(measured, key=lambda each: _merit(each.held["validation"]))
        return Promotion(chosen.spec, best.version, f"{why}; of its seeds the best on the validation split")
    return Promotion(chosen.spec, mine[0].version, f"{why}; its first seed, because the test examples choose nothing")


def _merit(metrics: Mapping[str, Any]) -> float:
    return float(metrics.get("accuracy", -metrics["loss"]))


def _advice(rows: Sequence[Row]) -> str:
    asked = [row.verdict for row in rows if row.verdict and row.verdict.word == "undecided"]
    few = [each.more_seeds for each in asked if each.more_seeds is not None]
    if not few:
        return asked[0].advice()
    return f"about {min(few)} more seed{'' if min(few) == 1 else 's'} would settle the first of them"


def _commonest(data: Any) -> float | None:
    """What always giving the commonest class of the training examples would score, in points."""
    if data.kind != "classify" or not isinstance(getattr(data.test[0], "label", None), str):
        return None
    counts: dict[str, int] = {}
    for example in data.train:
        counts[example.label] = counts.get(example.label, 0) + 1
    commonest = max(counts, key=lambda label: counts[label])
    return 100 * sum(1 for example in data.test if example.label == commonest) / len(data.test)


def _notes(data: Any, rows: Sequence[Row], made: Design) -> tuple[str, ...]:
    notes = list(data.notes)
    judged = sum(row.verdict is not None for row in rows)
    if judged > 1:
        notes.append(
            f"{judged} rows are judged, each for itself: with many rows some verdict is wrong more often than one is"
        )
    if len(made.seeds) < 3:
        notes.append("fewer than three seeds say little about luck")
    return tuple(notes)
