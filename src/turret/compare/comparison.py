"""Judges the results of a comparison: rows with verdicts and costs, classes, disagreements, and what to promote.

The rows are methods that were trained for it, or a composition and its parts, as they are stored.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Literal

import numpy as np

from turret.compare.collapse import FEWEST, Collapse, Learnt, judge_learning, still_falling
from turret.compare.design import UNTRAINED, Candidate, Design, Power
from turret.compare.report_text import shorten_text
from turret.compare.results import CellResult, Costs, Output, costs_of, made_with
from turret.compare.verdict import CONFIDENCE, Interval, Verdict, interval, judge, mcnemar, rank_correlation_interval
from turret.data import Dataset, Example
from turret.errors import TrainingError
from turret.json_types import JsonMapping, JsonObject
from turret.methods import method_named
from turret.notebook import Cell, Table, as_html
from turret.statistics import Floats
from turret.tasks import main_metric, task_of
from turret.tasks.shapes import Metrics, number_of


@dataclass(frozen=True)
class ComparisonRow:
    """One method with its settings, over all its seeds on all training examples."""

    spec: str
    label: str
    kind: str  # full, lora, prefix, head, peft, or of a row that trains nothing
    lr: float | None
    seeds: tuple[int, ...]
    versions: tuple[str, ...]
    score: Interval | None  # points of the metric, over seeds that did not collapse; None: nothing has run
    metrics: Mapping[str, float]  # means over the seeds that did not collapse
    verdict: Verdict | None  # None for the baseline
    mcnemar: tuple[tuple[int, int, float], ...]  # per seed: (only this right, only the baseline right, exact p)
    costs: Costs | None
    failed: str | None
    collapses: tuple[Collapse, ...] = ()  # trainings that learnt nothing while others of this method did
    learnt_nothing: bool = False  # every seed is at the level of guessing
    trained_out: bool | None = None  # False: the loss still fell at the last step of half of the trainings or more
    steps: int | None = None  # of each training, the mean over seeds; None: nothing was trained
    at_equal_steps: Verdict | None = None  # against the baseline trained for as many steps, where its own differ
    losses: tuple[tuple[int, tuple[float, ...]], ...] = ()  # per seed: training losses, means over equal stretches

    @property
    def trains(self) -> bool:
        """Whether trainings make it."""
        return self.kind not in UNTRAINED

    @property
    def marks(self) -> tuple[str, ...]:
        """Warnings to show next to the score."""
        marks = [f"{len(self.collapses)} of {len(self.seeds)} collapsed"] if self.collapses else []
        marks += ["learnt nothing"] if self.learnt_nothing else []
        return (*marks, *(["not trained out"] if self.trained_out is False else []))


@dataclass(frozen=True)
class CurvePoint:
    """One method on a part of the training examples."""

    spec: str
    fraction: float
    examples: int
    score: Interval
    seeds: int
    word: str | None


# --- claims -----------------------------------------------------------------------------------------------------------
# Common claims about LoRA and prefix tuning against full fine-tuning, each with what was measured here.


ClaimAnswer = Literal["yes", "no", "not shown"]


@dataclass(frozen=True)
class Claim:
    """One claim, tested on one row."""

    claim: str
    spec: str
    measured: str
    answer: ClaimAnswer


def claims(rows: Sequence[ComparisonRow], against: str) -> tuple[Claim, ...]:
    """Every claim for every LoRA and prefix row. None if the baseline is not full fine-tuning, or has not run.

    Args:
        against: spec of the baseline.
    """
    full = next((row for row in rows if row.spec == against), None)
    if full is None or full.costs is None or not method_named(full.kind).every_weight:
        return ()
    tested: list[Claim] = []
    for row in rows:
        if method_named(row.kind).claimed and row.costs is not None:
            tested += [
                _parameters(row.spec, row.costs, full.costs),
                _memory(row.spec, row.costs, full.costs),
                _quality(row),
                _size(row.spec, row.costs),
                _time(row.spec, row.costs, full.costs),
            ]
    return tuple(sorted(tested, key=lambda each: ORDER.index(each.claim)))


ORDER = (
    "more than 99% fewer trainable parameters",
    "up to 95% less memory",
    "within 1-2% of full fine-tuning",
    "adapters of one or two megabytes",
    "faster training",
)


def _parameters(spec: str, own: Costs, full: Costs) -> Claim:
    saved = 1 - own.trainable / max(1, full.trainable)
    measured = f"{100 * saved:.2f}% fewer: {own.trainable:,} of {full.trainable:,}"
    return Claim(ORDER[0], spec, measured, "yes" if saved > 0.99 else "no")


def _memory(spec: str, own: Costs, full: Costs) -> Claim:
    if not (own.above_base and own.peak and full.above_base and full.peak and full.above_base.mean):
        return Claim(ORDER[1], spec, "not measured", "not shown")
    saved, whole = 1 - own.above_base.mean / full.above_base.mean, 1 - own.peak.mean / full.peak.mean
    measured = f"{100 * saved:.0f}% less above the loaded base, {100 * whole:.0f}% less of the whole process"
    return Claim(ORDER[1], spec, measured, "yes" if saved >= 0.95 else "no")


def _quality(row: ComparisonRow) -> Claim:
    verdict = row.verdict
    if verdict is None:
        return Claim(ORDER[2], row.spec, "not measured", "not shown")
    span = verdict.span()
    if verdict.seeds < 2:
        return Claim(ORDER[2], row.spec, f"{span}, one seed", "not shown")
    if verdict.collapsed:
        return Claim(ORDER[2], row.spec, f"{verdict.collapses()}; in the others {span}", "not shown")
    d = verdict.difference
    return Claim(ORDER[2], row.spec, span, "yes" if d.low >= -2 else "no" if d.high < -2 else "not shown")


def _size(spec: str, own: Costs) -> Claim:
    size = own.bundle_bytes
    return Claim(ORDER[3], spec, f"{size / 1e6:.2f} MB on disk", "yes" if size <= 2_000_000 else "no")


def _time(spec: str, own: Costs, full: Costs) -> Claim:
    if not (own.train_seconds and full.train_seconds):
        return Claim(ORDER[4], spec, "not measured", "not shown")
    speed = full.train_seconds.mean / max(own.train_seconds.mean, 1e-9)
    return Claim(
        ORDER[4], spec, f"{speed:.2f}x the speed, one seed, the whole training", "yes" if speed > 1.05 else "no"
    )


# --- promotion --------------------------------------------------------------------------------------------------------
# Recommends which version to promote after a comparison.


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


def _merit(metrics: Metrics) -> float:
    name = main_metric(metrics) or "loss"
    return number_of(metrics, name) * (-1 if name == "loss" else 1)


def _advice(undecided: Sequence[Verdict]) -> str:
    by_seeds = [each for each in undecided if each.more_seeds is not None and each.more_examples is None]
    return min(by_seeds, key=lambda each: each.more_seeds or 0).advice() if by_seeds else undecided[0].advice()


# --- comparison -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A comparison in its present state; `missing` trainings have not run yet."""

    name: str
    base: JsonMapping  # id, fingerprint
    task: str
    metric: str  # accuracy or rougeL
    against: str  # spec of the baseline
    margin: float  # points
    confidence: float
    seeds: tuple[int, ...]
    data: JsonMapping
    rows: tuple[ComparisonRow, ...]
    curves: tuple[CurvePoint, ...]
    overtaking: tuple[str, ...]  # a sentence per method: with how much data it is better, as good or worse
    claims: tuple[Claim, ...]
    classes: tuple[PerClass, ...]
    confusions: tuple[Confusion, ...]
    disagreements: tuple[Disagreement, ...]
    examples: tuple[Disagreement, ...]  # evenly spread over the test examples
    promotion: Promotion
    recipes: Mapping[str, str]  # spec -> TOML of its first seed
    notes: tuple[str, ...]
    said: tuple[str, ...]  # how each row that trains nothing answers, a sentence each
    missing: int
    budget: float | None  # seconds
    folder: str
    made: JsonMapping  # dates, device and versions of its trainings
    command: str  # that repeats it
    power: Power | None  # what this design can decide; None for a composition
    composition: str | None = None  # that is compared with its parts; None: methods are compared

    def without_texts(self) -> Comparison:
        """The comparison without the texts of examples and the answers to them, for readers who may not see them."""
        notes = (*self.notes, "the texts of examples were left out")
        return replace(self, disagreements=(), examples=(), notes=notes)

    def _repr_html_(self) -> str:
        rows = [
            (
                row.label,
                None if row.score is None else f"{row.score.mean:.1f}",
                None if row.score is None else f"{row.score.low:.1f} to {row.score.high:.1f}",
                row.failed or self._verdict_sentence(row),
                ", ".join(row.marks),
            )
            for row in self.rows
        ]
        facts: dict[str, Cell] = {
            "base": str(self.base.get("id")),
            "seeds": len(self.seeds),
            "trainings to come": self.missing or None,
            "report": f"{self.folder}/report.html",
        }
        columns = ("method", self.metric, f"{self.confidence:.0%} interval", "verdict", "")
        return as_html(f"Comparison of {self.name}", facts, Table(columns, rows), self.promotion.why)

    def _verdict_sentence(self, row: ComparisonRow) -> str:
        return "the baseline" if row.verdict is None else row.verdict.sentence(self.against_label)

    def as_json(self) -> JsonObject:
        """The content of report.json, without its headline."""
        content = asdict(self)
        for row, fields in zip(self.rows, content["rows"], strict=True):
            fields["marks"] = list(row.marks)
            if row.verdict is not None:
                fields["verdict"]["sentence"] = row.verdict.sentence(self.against_label)
            if row.at_equal_steps is not None:
                fields["at_equal_steps"]["sentence"] = self.at_equal_steps(row)
        if self.power is not None:
            content["power"] = self.power.as_json()
        return content | {"report": f"{self.folder}/report.html"}

    def at_equal_steps(self, row: ComparisonRow) -> str:
        """The verdict against the baseline trained for as many steps, in one sentence; empty if the row has none."""
        if row.at_equal_steps is None:
            return ""
        return row.at_equal_steps.sentence(f"{self.against_label} with as many steps ({row.steps})")

    @property
    def against_label(self) -> str:
        """The baseline's name for a reader."""
        return next((row.label for row in self.rows if row.spec == self.against), self.against)


def comparison(
    design: Design,
    data: Dataset,
    results: Sequence[CellResult],
    *,
    failures: Mapping[str, str],
    missing: int,
    budget: float | None,
    folder: str,
    command: str = "",
    power: Power | None = None,
) -> Comparison:
    """Judge the results so far. Raises TrainingError if they belong to different bases.

    Args:
        data: the data set; scores are in the order of its test examples.
        results: in any order, because workers end cells in any order.
        failures: spec -> why it could not run.
        missing: number of trainings that have not run.
        budget: seconds that the trainings may take.
        folder: of the comparison.
        command: that repeats it.
        power: what the design can decide.
    """
    places = {(cell.candidate.spec, cell.seed, cell.fraction): place for place, cell in enumerate(design.cells())}
    results = sorted(results, key=lambda each: places[each.spec, each.seed, each.fraction])
    bases = {result.base["fingerprint"] for result in results}
    if len(bases) > 1:
        raise TrainingError(f"the base changed between trainings of this comparison: delete {folder} and compare again")
    largest = [result for result in results if result.fraction == design.fractions[0]]
    sides = {candidate.spec: SeededResults.of(candidate.spec, largest, data.test) for candidate in design.candidates}
    baseline = sides[design.against]
    rows = tuple(_row(design, each, sides, failures.get(each.spec)) for each in design.candidates)
    rows = tuple(_at_equal_steps(design, row, sides) for row in rows)
    good = [each for each in largest if each.seed not in sides[each.spec].learnt.seeds]
    seed = design.recipe.split_seed
    classes = data.labels if _one_class(data) else ()
    specs = [row.spec for row in rows if row.score is not None]
    points = tuple(_curves(design, results, data.test)) if len(design.fractions) > 1 else ()
    composition = design.composition
    trained = {row.spec for row in rows if row.trains}
    recipes = {spec: next(each.recipe for each in largest if each.spec == spec) for spec in specs if spec in trained}
    return Comparison(
        name=composition or design.recipe.name,
        base=results[0].base,
        task=data.kind,
        metric=task_of(data.kind).metric,
        against=design.against,
        margin=design.margin,
        confidence=CONFIDENCE,
        seeds=design.seeds,
        data={
            "source": design.recipe.data.source,
            "train": design.train,
            "validation": len(data.validation),
            "test": len(data.test),
            "labels": list(data.labels),
            "digest": data.digest,
            "split_seed": seed,
            "commonest": _commonest(data),
        },
        rows=rows,
        curves=points,
        overtaking=verdicts_by_examples(points, rows, design.against),
        claims=claims(rows, design.against),
        classes=per_class(good, baseline.trained, data, seed) if classes else (),
        confusions=confusion(good, data, classes, specs) if classes else (),
        disagreements=disagreements(good, data, specs),
        examples=some_examples(good, data, specs),
        promotion=not_promoted(composition) if composition else promotion(rows, design.against, good),
        recipes={} if composition else recipes,
        notes=_notes(data, rows, design, largest),
        said=tuple(dict.fromkeys(each.said for each in largest if each.said)),
        missing=missing,
        budget=budget,
        folder=folder,
        made=made_with(results),
        command=command,
        power=power,
        composition=composition,
    )


@dataclass(frozen=True)
class SeededResults:
    """The trainings of one row in the order of their seeds, whichever ended first, and which of them learnt."""

    all: Mapping[int, CellResult]
    learnt: Learnt

    @classmethod
    def of(cls, spec: str, results: Sequence[CellResult], examples: Sequence[Example]) -> SeededResults:
        """The row's results among all. examples: the test examples, in the order of the answers."""
        own = {each.seed: each for each in sorted(results, key=lambda each: each.seed) if each.spec == spec}
        return cls(own, judge_learning(list(own.values()), examples))

    @property
    def trained(self) -> dict[int, CellResult]:
        """The results that did not collapse."""
        return {seed: each for seed, each in self.all.items() if seed not in self.learnt.seeds}


def generator(seed: int, *words: str | float) -> np.random.Generator:
    """A generator that depends on the split's seed and on what is judged, so that a report can be repeated."""
    return np.random.default_rng([seed, zlib.crc32(repr(words).encode())])


def paired_differences(first: Mapping[int, CellResult], second: Mapping[int, CellResult]) -> Floats | None:
    """Differences of scores (S, N) over the seeds that both have; None if there are none."""
    seeds = sorted(first.keys() & second.keys())
    return np.stack([first[seed].scores - second[seed].scores for seed in seeds]) if seeds else None


def judge_pair(
    side: SeededResults, baseline: SeededResults, margin: float, rng: np.random.Generator, *, fixed: bool = False
) -> Verdict | None:
    """The verdict over the seeds at which both learnt. If there are none, over all seeds, without a claim.

    Args:
        fixed: both are stored versions, which are judged as they are.
    """
    d = paired_differences(side.trained, baseline.trained)
    claimed = d is not None
    if d is None:
        d = paired_differences(side.all, baseline.all)
    if d is None:
        return None
    collapsed, trainings = sorted(side.learnt.seeds), len(side.all)
    return judge(d, margin, rng, collapsed=collapsed, trainings=trainings, claimed=claimed, fixed=fixed)


def score_of(results: Sequence[CellResult], rng: np.random.Generator) -> Interval:
    """The metric of some trainings, in points."""
    scores, first = np.stack([each.scores for each in results]), results[0]
    by_ranks = task_of(first.kind).rank_metric in first.metrics
    return (rank_correlation_interval(scores) if by_ranks else interval(scores, rng, between=(0, 1))).times(100)


def _row(design: Design, candidate: Candidate, sides: Mapping[str, SeededResults], failed: str | None) -> ComparisonRow:
    spec, seed = candidate.spec, design.recipe.split_seed
    side, baseline = sides[spec], sides[design.against]
    own, good = list(side.all.values()), list(side.trained.values())
    verdict = None
    if spec != design.against:
        fixed, draw = design.composition is not None, generator(seed, spec, "verdict")
        verdict = judge_pair(side, baseline, design.margin, draw, fixed=fixed)
    tests = [
        mcnemar(side.all[each].scores == 1, baseline.all[each].scores == 1)
        for each in sorted(side.all.keys() & baseline.all.keys())
        if verdict is not None and task_of(side.all[each].kind).right_or_wrong
    ]
    score = None
    if own:
        score = score_of(good, generator(seed, spec))
    numbers = [key for key in (own[0].metrics if own else ()) if isinstance(own[0].metrics[key], (int, float))]
    falling = [still_falling(each.losses) for each in good if len(each.losses) >= FEWEST]
    return ComparisonRow(
        spec=spec,
        label=candidate.label,
        kind=candidate.kind,
        lr=own[0].lr if own else None,
        steps=_steps(side),
        seeds=tuple(side.all),
        versions=tuple(each.version for each in own if each.version is not None),
        score=score,
        metrics={key: fmean(float(each.metrics[key]) for each in good) for key in numbers},
        verdict=verdict,
        mcnemar=tuple(tests),
        costs=costs_of(own) if own else None,
        failed=failed,
        collapses=side.learnt.collapses,
        learnt_nothing=side.learnt.nothing,
        trained_out=2 * sum(falling) < len(falling) if falling else None,
        losses=tuple((each.seed, tuple(each.losses)) for each in own if each.losses),
    )


def _at_equal_steps(design: Design, row: ComparisonRow, sides: Mapping[str, SeededResults]) -> ComparisonRow:
    """The row with its verdict against the baseline trained for as many steps, if it was trained for other steps."""
    baseline = sides[design.against]
    if row.steps is None or row.spec in design.twins or row.steps == _steps(baseline):
        return row
    twin = next((sides[spec] for spec in sorted(design.twins) if _steps(sides[spec]) == row.steps), None)
    if twin is None:
        return row
    draw = generator(design.recipe.split_seed, row.spec, "equal steps")
    return replace(row, at_equal_steps=judge_pair(sides[row.spec], twin, design.margin, draw))


def _steps(side: SeededResults) -> int | None:
    """The mean number of steps of some trainings; None if nothing was trained, or none has run."""
    known = [each.timing["steps"] for each in side.all.values() if "steps" in each.timing]
    return round(fmean(known)) if known else None


def _curves(design: Design, results: Sequence[CellResult], examples: Sequence[Example]) -> list[CurvePoint]:
    points = []
    for candidate in design.candidates:
        for fraction in sorted(design.fractions):
            part = [each for each in results if each.fraction == fraction]
            side, baseline = (SeededResults.of(spec, part, examples) for spec in (candidate.spec, design.against))
            if not side.all:
                continue
            rng = generator(design.recipe.split_seed, candidate.spec, fraction)
            score = score_of(list(side.trained.values()), rng)
            verdict = None
            if candidate.spec != design.against:
                verdict = judge_pair(side, baseline, design.margin, rng)
            word = verdict.word if verdict else None
            count = max(1, round(fraction * design.train))
            points.append(CurvePoint(candidate.spec, fraction, count, score, len(side.all), word))
    return points


WORDS = {"better": "better than", "within": "as good as", "worse": "worse than", "undecided": "undecided against"}


def verdicts_by_examples(points: Sequence[CurvePoint], rows: Sequence[ComparisonRow], against: str) -> tuple[str, ...]:
    """A sentence per method: the numbers of training examples with each verdict."""
    labels = {row.spec: row.label for row in rows}
    sentences = []
    for row in rows:
        sizes = {
            word: [str(point.examples) for point in points if point.spec == row.spec and point.word == word]
            for word in WORDS
        }
        parts = [f"{WORDS[word]} {labels[against]} with {', '.join(own)}" for word, own in sizes.items() if own]
        if parts and row.kind != "base":
            sentences.append(f"{row.label}: {'; '.join(parts)} training examples")
    return tuple(sentences)


def _one_class(data: Dataset) -> bool:
    """Whether an answer is one class, right or wrong."""
    return task_of(data.kind).right_or_wrong and isinstance(data.test[0].output, str)


def _commonest(data: Dataset) -> float | None:
    """The score, in points, of always answering the most common class of the training examples."""
    if not _one_class(data) or not data.train:
        return None
    commonest, _ = Counter(example.output for example in data.train).most_common(1)[0]
    return 100 * sum(example.output == commonest for example in data.test) / len(data.test)


def _notes(
    data: Dataset, rows: Sequence[ComparisonRow], design: Design, largest: Sequence[CellResult]
) -> tuple[str, ...]:
    notes = list(data.notes)
    for row in rows:
        notes += [f"{row.label} collapsed at {each}; scores and intervals leave it out" for each in row.collapses]
        if row.learnt_nothing and row.kind != "base":
            notes.append(f"{row.label} learnt nothing: with no seed do the answers depend on the texts")
        if row.trained_out is False:
            notes.append(
                f"{row.label} is not trained out: its loss still fell at the last step; more epochs would help"
            )
    notes += [f"{each.spec}, seed {each.seed}: {warning}" for each in largest for warning in each.warnings]
    verdicts = sum(row.verdict is not None for row in rows)
    if verdicts > 1:
        notes.append(f"{verdicts} rows are judged separately: the more rows, the more likely is one wrong verdict")
    if design.composition:
        notes.append("the versions are compared as they are stored: other trainings of them would differ")
    elif len(design.seeds) < 3:
        notes.append("fewer than three seeds say little about the variation between seeds")
    return tuple(notes)


# --- details ----------------------------------------------------------------------------------------------------------


MOST_CLASSES = 30
MOST_EXAMPLES = 12
SOME_EXAMPLES = 6
MOST_CHARACTERS = 400


@dataclass(frozen=True)
class PerClass:
    """The share of a class's examples that a row gets right, and its difference from the baseline."""

    label: str
    spec: str
    examples: int
    right: float  # points
    difference: Interval  # points


@dataclass(frozen=True)
class Confusion:
    """Counts by true class and answer, means over seeds."""

    spec: str
    labels: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Disagreement:
    """A test example with every method's answer."""

    text: str
    wanted: str
    answers: tuple[tuple[str, str, float], ...]  # (spec, most common answer, mean score over seeds)


def per_class(
    results: Sequence[CellResult], baseline: Mapping[int, CellResult], data: Dataset, seed: int
) -> tuple[PerClass, ...]:
    """The most common classes, for each row but the baseline and the bare base.

    Args:
        baseline: its results by seed.
        seed: of the intervals.
    """
    true = np.array([example.output for example in data.test])
    counts = Counter(true.tolist())
    classes = []
    for label in [label for label, _ in counts.most_common(MOST_CLASSES)]:
        places = np.flatnonzero(true == label)
        for spec in dict.fromkeys(each.spec for each in results):
            own = {each.seed: each for each in results if each.spec == spec and each.spec != "base"}
            seeds = sorted(own.keys() & baseline.keys())
            if not seeds or any(own[each] is baseline[each] for each in seeds):
                continue
            d = np.stack([own[each].scores[places] - baseline[each].scores[places] for each in seeds])
            rng = np.random.default_rng([seed, zlib.crc32(f"{spec}\n{label}".encode())])
            right = 100 * float(np.mean([own[each].scores[places].mean() for each in seeds]))
            difference = interval(d, rng, resamples=2000).times(100)
            classes.append(PerClass(str(label), spec, len(places), right, difference))
    return tuple(classes)


def confusion(
    results: Sequence[CellResult], data: Dataset, labels: Sequence[str], specs: Sequence[str]
) -> tuple[Confusion, ...]:
    """The confusions of each row; none if there are too many classes to read."""
    if len(labels) > MOST_CLASSES:
        return ()
    place = {label: number for number, label in enumerate(labels)}
    matrices = []
    for spec in specs:
        own = [each for each in results if each.spec == spec]
        counts = np.zeros((len(labels), len(labels)))
        for each in own:
            for example, answer in zip(data.test, each.answers, strict=True):
                counts[place[str(example.output)], place[str(answer)]] += 1 / len(own)
        matrices.append(Confusion(spec, tuple(labels), tuple(tuple(row) for row in counts.round(2).tolist())))
    return tuple(matrices)


def disagreements(results: Sequence[CellResult], data: Dataset, specs: Sequence[str]) -> tuple[Disagreement, ...]:
    """The test examples on which the rows differ most, without the bare base."""
    rows = _answering(results, specs)
    if len(rows) < 2:
        return ()
    means = np.stack([np.mean([each.scores for each in own], axis=0) for own in rows.values()])  # (rows, N)
    spread = means.max(0) - means.min(0)
    places = [int(place) for place in np.argsort(-spread, kind="stable")[:MOST_EXAMPLES] if spread[place] > 0]
    return tuple(_disagreement(rows, data.test, place) for place in places)


def some_examples(results: Sequence[CellResult], data: Dataset, specs: Sequence[str]) -> tuple[Disagreement, ...]:
    """A few test examples, evenly spread over all."""
    rows, count = _answering(results, specs), min(SOME_EXAMPLES, len(data.test))
    return (
        tuple(_disagreement(rows, data.test, number * len(data.test) // count) for number in range(count))
        if rows
        else ()
    )


def _answering(results: Sequence[CellResult], specs: Sequence[str]) -> dict[str, list[CellResult]]:
    """The results of each row but the bare base."""
    rows = {spec: [each for each in results if each.spec == spec and each.spec != "base"] for spec in specs}
    return {spec: own for spec, own in rows.items() if own}


def _disagreement(rows: Mapping[str, Sequence[CellResult]], examples: Sequence[Example], place: int) -> Disagreement:
    answers = tuple(
        (
            spec,
            _commonest_answer([each.answers[place] for each in own]),
            float(np.mean([each.scores[place] for each in own])),
        )
        for spec, own in rows.items()
    )
    example = examples[place]
    text, wanted = (shorten_text(each, MOST_CHARACTERS) for each in (example.input, _output_text(example.output)))
    return Disagreement(text, wanted, answers)


def _output_text(output: Output) -> str:
    return output if isinstance(output, str) else ", ".join(output)


def _commonest_answer(answers: Sequence[Output]) -> str:
    return shorten_text(Counter(map(_output_text, answers)).most_common(1)[0][0], MOST_CHARACTERS)
