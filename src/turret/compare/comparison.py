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
from turret.compare.collapse import Collapse, Learnt, learnt, trained
from turret.compare.costs import Costs, costs
from turret.compare.design import Design
from turret.compare.details import (
    Confusion,
    Disagreement,
    PerClass,
    confusion,
    disagreements,
    per_class,
    some_examples,
)
from turret.compare.evidence import Array, Interval, interval, mcnemar
from turret.compare.losses import FEWEST, still_falling
from turret.compare.power import Power
from turret.compare.promotion import Promotion, promotion
from turret.compare.results import Result, made_with
from turret.compare.verdict import Verdict, judge
from turret.errors import TrainingError
from turret.tasks import task_of


@dataclass(frozen=True)
class ComparisonRow:
    """One method with its settings, over all its seeds on all training examples."""

    spec: str
    label: str
    kind: str  # base, head, full, lora, prefix
    lr: float | None
    seeds: tuple[int, ...]
    versions: tuple[str, ...]
    score: Interval | None  # points of the metric, of the seeds that did not collapse; None: nothing ran
    metrics: Mapping[str, float]  # means over the seeds that did not collapse
    verdict: Verdict | None  # None for the row that the others are judged against
    mcnemar: tuple[tuple[int, int, float], ...]  # a seed: (only this right, only that right, exact p)
    costs: Costs | None
    failed: str | None
    collapses: tuple[Collapse, ...] = ()  # trainings that learnt nothing while others of this method did
    learnt_nothing: bool = False  # every seed is at the level of guessing
    trained_out: bool | None = None  # False: the loss still fell at the last step of half of the trainings or more
    losses: tuple[tuple[int, tuple[float, ...]], ...] = ()  # a seed: of training, means over equal stretches

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader must know beside the score."""
        count = len(self.seeds)
        said = [f"{len(self.collapses)} of {count} collapsed"] if self.collapses else []
        said += ["learnt nothing"] if self.learnt_nothing else []
        return (*said, *(["not trained out"] if self.trained_out is False else []))


@dataclass(frozen=True)
class CurvePoint:
    """A row on a part of the training examples."""

    spec: str
    fraction: float
    examples: int
    score: Interval
    seeds: int
    word: str | None


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
    rows: tuple[ComparisonRow, ...]
    curves: tuple[CurvePoint, ...]
    overtaking: tuple[str, ...]  # a sentence a method: with how much data it is better, as good or worse
    claims: tuple[Claim, ...]
    classes: tuple[PerClass, ...]
    confusions: tuple[Confusion, ...]
    disagreements: tuple[Disagreement, ...]
    examples: tuple[Disagreement, ...]  # evenly over the test examples, none chosen
    promotion: Promotion
    recipes: Mapping[str, str]  # spec -> TOML of its first seed
    notes: tuple[str, ...]
    missing: int
    budget: float | None
    folder: str
    made: Mapping[str, Any]  # when, where and with what its trainings were made
    command: str  # that makes it again
    power: Power | None  # what this design could decide

    def without_texts(self) -> Comparison:
        """The same for those who may not read the examples: their texts and the answers to them are left out."""
        notes = (*self.notes, "the texts of examples were left out")
        return replace(self, disagreements=(), examples=(), notes=notes)

    def as_json(self) -> dict[str, Any]:
        said = asdict(self)
        for row, made in zip(self.rows, said["rows"], strict=True):
            made["marks"] = list(row.marks)
            if row.verdict is not None:
                made["verdict"]["sentence"] = row.verdict.sentence(self.against_label)
        if self.power is not None:
            said["power"] = self.power.as_json()
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
    command: str = "",
    power: Power | None = None,
) -> Comparison:
    """Judge what there is. data: the data set, whose test examples the scores belong to."""
    bases = {result.base["fingerprint"] for result in results}
    if len(bases) > 1:
        raise TrainingError(f"the base changed between trainings of this comparison: delete {folder} and compare again")
    whole = [result for result in results if result.fraction == made.fractions[0]]
    sides = {candidate.spec: SeededResults.of(candidate.spec, whole, data.test) for candidate in made.candidates}
    yardstick = sides[made.against]
    rows = tuple(
        _row(made, candidate, sides[candidate.spec], yardstick, failures, confidence) for candidate in made.candidates
    )
    good = [each for each in whole if each.seed not in sides[each.spec].learnt.seeds]
    classes = data.labels if _one_class(data) else ()
    specs = [row.spec for row in rows if row.score is not None]
    first = results[0]
    points = tuple(_curves(made, results, data.test, confidence)) if len(made.fractions) > 1 else ()
    return Comparison(
        name=made.recipe.name,
        base=first.base,
        task=data.kind,
        metric=task_of(data.kind).metric,
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
        classes=per_class(good, yardstick.trained, data, classes, confidence, made.recipe.split_seed)
        if classes
        else (),
        confusions=confusion(good, data, classes, specs) if classes else (),
        disagreements=disagreements(good, data, specs),
        examples=some_examples(good, data, specs),
        promotion=promotion(rows, made.against, good),
        recipes={spec: next(each.recipe for each in whole if each.spec == spec) for spec in specs},
        notes=_notes(data, rows, made, whole),
        missing=missing,
        budget=budget,
        folder=folder,
        made=made_with(results),
        command=command,
        power=power,
    )


@dataclass(frozen=True)
class SeededResults:
    """The trainings of one row, by seed, and which of them learnt."""

    all: Mapping[int, Result]
    learnt: Learnt

    @classmethod
    def of(cls, spec: str, results: Sequence[Result], examples: Sequence[Any]) -> SeededResults:
        own = {each.seed: each for each in results if each.spec == spec}
        return cls(own, learnt(list(own.values()), examples))

    @property
    def trained(self) -> dict[int, Result]:
        """Without those that collapsed."""
        return trained(self.all, self.learnt.seeds)


def generator(seed: int, *words: object) -> np.random.Generator:
    """The same intervals for the same results: drawn from the split's seed and what is judged."""
    return np.random.default_rng([seed, zlib.crc32(repr(words).encode())])


def paired(first: Mapping[int, Result], second: Mapping[int, Result]) -> Array | None:
    """Differences of scores (S, N) over the seeds that both have; None where there are none."""
    seeds = sorted(first.keys() & second.keys())
    return np.stack([first[seed].scores - second[seed].scores for seed in seeds]) if seeds else None


def judged(
    mine: SeededResults, yardstick: SeededResults, margin: float, rng: np.random.Generator, confidence: float
) -> Verdict | None:
    """The verdict over the seeds at which both learnt; over all, claiming nothing, where there is none of them."""
    d = paired(mine.trained, yardstick.trained)
    claimed = d is not None
    if d is None:
        d = paired(mine.all, yardstick.all)
    if d is None:
        return None
    collapsed = sorted(mine.learnt.seeds)
    return judge(d, margin, rng, confidence=confidence, collapsed=collapsed, trainings=len(mine.all), claimed=claimed)


def _row(
    made: Design,
    candidate: Any,
    side: SeededResults,
    yardstick: SeededResults,
    failures: Mapping[str, str],
    confidence: float,
) -> ComparisonRow:
    spec, seed = candidate.spec, made.recipe.split_seed
    own, good = list(side.all.values()), list(side.trained.values())
    verdict = None
    if spec != made.against:
        verdict = judged(side, yardstick, made.margin, generator(seed, spec, "verdict"), confidence)
    tests = [
        mcnemar(side.all[each].scores == 1, yardstick.all[each].scores == 1)
        for each in sorted(side.all.keys() & yardstick.all.keys())
        if verdict is not None and task_of(side.all[each].kind).right_or_wrong
    ]
    score = None
    if own:
        scores = np.stack([result.scores for result in good])
        score = interval(scores, generator(seed, spec), confidence=confidence, between=(0, 1)).times(100)
    numbers = [key for key in (own[0].metrics if own else ()) if isinstance(own[0].metrics[key], (int, float))]
    falling = [still_falling(each.losses) for each in good if len(each.losses) >= FEWEST]
    return ComparisonRow(
        spec=spec,
        label=candidate.label,
        kind=candidate.kind,
        lr=own[0].lr if own else None,
        seeds=tuple(side.all),
        versions=tuple(each.version for each in own if each.version is not None),
        score=score,
        metrics={key: fmean(float(each.metrics[key]) for each in good) for key in numbers},
        verdict=verdict,
        mcnemar=tuple(tests),
        costs=costs(own) if own else None,
        failed=failures.get(spec),
        collapses=side.learnt.collapses,
        learnt_nothing=side.learnt.nothing,
        trained_out=2 * sum(falling) < len(falling) if falling else None,
        losses=tuple((each.seed, tuple(each.losses)) for each in own if each.losses),
    )


def _curves(made: Design, results: Sequence[Result], examples: Sequence[Any], confidence: float) -> list[CurvePoint]:
    points = []
    for candidate in made.candidates:
        for fraction in sorted(made.fractions):
            part = [each for each in results if each.fraction == fraction]
            own, yard = (SeededResults.of(spec, part, examples) for spec in (candidate.spec, made.against))
            if not own.all:
                continue
            rng = generator(made.recipe.split_seed, candidate.spec, fraction)
            scores = np.stack([each.scores for each in own.trained.values()])
            score = interval(scores, rng, confidence=confidence, between=(0, 1)).times(100)
            verdict = None
            if candidate.spec != made.against:
                verdict = judged(own, yard, made.margin, rng, confidence)
            points.append(
                CurvePoint(
                    candidate.spec,
                    fraction,
                    max(1, round(fraction * made.train)),
                    score,
                    len(own.all),
                    verdict.word if verdict else None,
                )
            )
    return points


WORDS = {"better": "better than", "within": "as good as", "worse": "worse than", "undecided": "undecided against"}


def overtaking(points: Sequence[CurvePoint], rows: Sequence[ComparisonRow], against: str) -> tuple[str, ...]:
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


def _one_class(data: Any) -> bool:
    """Whether an answer is one class, right or wrong."""
    return task_of(data.kind).right_or_wrong and isinstance(data.test[0].label, str)


def _commonest(data: Any) -> float | None:
    """What always giving the commonest class of the training examples would score, in points."""
    if not _one_class(data):
        return None
    counts: dict[str, int] = {}
    for example in data.train:
        counts[example.label] = counts.get(example.label, 0) + 1
    commonest = max(counts, key=lambda label: counts[label])
    return 100 * sum(1 for example in data.test if example.label == commonest) / len(data.test)


def _notes(data: Any, rows: Sequence[ComparisonRow], made: Design, whole: Sequence[Result]) -> tuple[str, ...]:
    notes = list(data.notes)
    for row in rows:
        notes += [f"{row.label} collapsed at {each}; scores and intervals leave it out" for each in row.collapses]
        if row.learnt_nothing and row.kind != "base":
            notes.append(f"{row.label} learnt nothing: the answers of every seed have nothing to do with the texts")
        if row.trained_out is False:
            notes.append(
                f"{row.label} is not trained out: its loss still fell at the last step; more epochs would help it"
            )
    notes += [f"{each.spec}, seed {each.seed}: {warning}" for each in whole for warning in each.warnings]
    judged = sum(row.verdict is not None for row in rows)
    if judged > 1:
        notes.append(
            f"{judged} rows are judged, each for itself: with many rows some verdict is wrong more often than one is"
        )
    if len(made.seeds) < 3:
        notes.append("fewer than three seeds say little about luck")
    return tuple(notes)
