"""Measure a stored version on other data, and find what it gets wrong. Loads torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from turret.adapters import require_base
from turret.compare import evaluation_page
from turret.compare.results import (
    Confusions,
    Coverage,
    Details,
    QuestionResult,
    Reliability,
    measure_coverage,
)
from turret.compare.verdict import interval
from turret.data import Example, Input, Labelled, TextPair
from turret.data.columns import RoleColumns
from turret.data.table_writer import TableWriter
from turret.errors import DataError, count_of
from turret.json_types import JsonObject
from turret.statistics import sign_flips, sign_test
from turret.store import Golden, Panel, Store, Version, golden, promises
from turret.store.catalog import PRODUCTION
from turret.tasks import Task, task_from_spec
from turret.tasks.calibration import Confidences, calibration_error, reliability
from turret.tasks.shapes import Answer, Metrics
from turret.tasks.task import Mistake
from turret.train.asking import Asking, logits_of_each
from turret.train.batches import EncodedRows
from turret.workspace import answering
from turret.workspace.answering import mount_version
from turret.workspace.cells import write_text
from turret.workspace.progress import Say, silent
from turret.workspace.reading import LabelledData, PanelData, PanelQuestion, read_labelled, trained_on_note
from turret.workspace.resident import load_base, read_adapter
from turret.workspace.results import Evaluation, PanelEvaluation

COVERAGE = 0.9  # of the sets of labels that an evaluation measures


def evaluate(
    store: Store, reference: str, labelled: LabelledData, say: Say = silent, device: str = "auto"
) -> Evaluation:
    """Metrics and mistakes of a version on labelled examples. device: where the base computes."""
    with mount_version(store, reference, say, device, judged=True) as ready:
        assert ready.version is not None
        say(f"answering {len(labelled.examples)} examples")
        started = time.perf_counter()
        found = answer_split(ready.task, ready.asking, labelled.examples)
        details = found.details(ready.task, labelled.places)
        notes = [note for note in ready.asking.base.notes if note.startswith("computes on ")]
        notes += ready.asking.notes
        seconds = time.perf_counter() - started
        notes += trained_on_note(store, ready.version, labelled.examples)
        return Evaluation(
            version=str(ready.version),
            digest=ready.version.digest,
            data={"source": labelled.data.source, "examples": len(labelled.examples)},
            metrics=found.metrics,
            seconds=seconds,
            notes=[*labelled.notes, *notes],
            details=details,
        )


def write_mistakes(found: Evaluation | PanelEvaluation, path: Path) -> TableWriter:
    """Write every wrong answer of an evaluation into a table, a row each, and return its writer."""
    if isinstance(found, PanelEvaluation):
        asked = [({"question": each.question}, one) for each in found.questions for one in each.details.mistakes]
        return _write_rows(asked, path, ("question",))
    return _write_rows([({}, each) for each in found.details.mistakes], path)


def _write_rows(
    mistakes: Sequence[tuple[Mapping[str, str], Mistake]], path: Path, first: Sequence[str] = ()
) -> TableWriter:
    """Write mistakes into a table. Each comes with further columns, which are named in `first`."""
    confident = mistakes and all(each.error == f"{each.confidence or 0:.2f}" for _, each in mistakes)
    says = [] if confident else ["error"]  # else it is the confidence
    texts = ["text", "text_pair"] if any(isinstance(each.asked, TextPair) for _, each in mistakes) else ["text"]
    with TableWriter(path, [*first, "row", "right", "given", "confidence", "score", *says, *texts]) as table:
        for own, each in mistakes:
            confidence = None if each.confidence is None else round(each.confidence, 6)
            table.write({**own, **each.as_json(), "confidence": confidence, "score": round(each.score, 6)})
    return table


def write_page(found: Evaluation | PanelEvaluation, path: Path, *, texts: bool = True) -> None:
    """Write an evaluation as one self-contained page.

    Args:
        texts: whether it shows texts of the data.
    """
    if isinstance(found, PanelEvaluation):
        write_text(path, evaluation_page.panel_html(found, texts=texts))
    else:
        write_text(path, evaluation_page.as_html(found, texts=texts))


@dataclass(frozen=True)
class AnsweredSplit:
    """Labelled examples with a version's answers.

    Args:
        logits: (B, C) of the examples; None of a task without probabilities.
    """

    examples: Sequence[Example]
    metrics: Metrics
    answers: Sequence[Answer]
    logits: Tensor | None

    def details(self, task: Task, places: Sequence[int]) -> Details:
        """Mistakes, reliability, confusions and coverage. places: the row of each example."""
        details = _details(task, self.examples, places, self.logits, self.answers)
        if self.logits is None or not task.ranks_labels or task.calibration is None:
            return details
        return replace(details, coverage=_coverage(task, self.logits, [each.labels for each in self.examples]))


def answer_split(
    task: Task, asking: Asking, examples: Sequence[Example], *, bare: bool = False, known: Tensor | None = None
) -> AnsweredSplit:
    """Ask about every example, and measure the answers.

    Args:
        bare: ask the base alone.
        known: the logits (B, C) of the examples, if they were computed before.
    """
    if known is None and task.calibrates and not bare:
        known = asking.logits(EncodedRows(task, examples).windows())
    metrics, answers = asking.evaluate(examples, bare=bare, logits=known)
    return AnsweredSplit(examples, metrics, answers, known)


def _details(
    task: Task,
    examples: Sequence[Example],
    places: Sequence[int],
    known: Tensor | None,
    answers: Sequence[Answer],
) -> Details:
    """Mistakes, reliability and confusions. known: the logits of the examples, of a task with probabilities."""
    mistakes = tuple(replace(each, row=places[each.row]) for each in task.worst(examples, answers))
    numbers = tuple(task.numbers(examples, answers))
    details = Details(mistakes, task.kind, numbers=numbers)
    if known is None:
        return details
    sure = task.confidences(known, examples)
    details = replace(details, reliability={question: _reliability(each) for question, each in sure.items()})
    if not task.ranks_labels or task.multi_label:
        return details
    return replace(details, confusion=_confusion(task, answers, [example.labels for example in examples]))


# --- panels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A version that answers questions of a panel, with the outputs of its head."""

    task: Task
    rows: Sequence[int]  # the texts that it was asked
    logits: Tensor  # (B, C), in their order


def evaluate_panel(
    store: Store, panel: Panel, read: PanelData, say: Say = silent, device: str = "auto"
) -> PanelEvaluation:
    """Metrics and mistakes of each question that the data answers. Each base is loaded once, one after another."""
    started, notes, asked = time.perf_counter(), list(read.notes), dict[str, _Asked]()
    texts = [Labelled(text, ()) for text in read.texts]
    for versions in _by_base(read):
        found, more = _ask(store, versions, read, say, device)
        asked |= found
        notes += more
        for version in versions:
            notes += trained_on_note(store, version, texts)
    return PanelEvaluation(
        panel=str(panel),
        data={"source": read.data.source, "examples": len(read.texts)},
        questions=[_judge_question(store, each, read, asked[str(each.version)]) for each in read.questions],
        left_out=list(read.left_out),
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def _by_base(read: PanelData) -> list[list[Version]]:
    """The versions that answer, without repetition, those of one base together."""
    versions = {str(each.version): each.version for each in read.questions}
    bases = dict[tuple[str, str], list[Version]]()
    for version in versions.values():
        base = version.base
        bases.setdefault((str(base["fingerprint"]), str(base.get("quantization"))), []).append(version)
    return list(bases.values())


def _ask(
    store: Store, versions: Sequence[Version], read: PanelData, say: Say, device: str
) -> tuple[dict[str, _Asked], list[str]]:
    """What versions of one base answer about the texts of their questions, in mixed passes; and notes."""
    adapters = [read_adapter(store, str(version))[1] for version in versions]
    say(f"loading {adapters[0].base.id}")
    base = load_base(adapters[0], device=device)
    rows, tasks = [], []
    for version, adapter in zip(versions, adapters, strict=True):
        require_base(adapter, base.fingerprint)
        own = [each.right for each in read.questions if str(each.version) == str(version)]
        rows.append([row for row in range(len(read.texts)) if any(right[row] is not None for right in own)])
        tasks.append(task_from_spec(adapter.task, base.tokenizer))
    say(f"asking {count_of(len(versions), 'adapter')} about {count_of(len(read.texts), 'text')}")
    encoded = [
        EncodedRows(task, [Labelled(read.texts[row], ()) for row in own]).windows()
        for task, own in zip(tasks, rows, strict=True)
    ]
    logits = logits_of_each(base, list(zip(adapters, tasks, encoded, strict=True)))
    every = zip(versions, tasks, rows, logits, strict=True)
    found = {str(version): _Asked(task, own, outputs) for version, task, own, outputs in every}
    return found, [note for note in base.notes if note.startswith("computes on ")]


def _judge_question(store: Store, each: PanelQuestion, read: PanelData, asked: _Asked) -> QuestionResult:
    right = {row: label for row, label in enumerate(each.right) if label is not None}
    places = [place for place, row in enumerate(asked.rows) if row in right]
    task, logits = asked.task.classifier_of(each.question.part, asked.logits[places])
    examples = [Labelled(read.texts[row], label) for row, label in right.items()]
    metrics, answers = task.judge(logits, examples)
    with store.database().reading() as connection:
        promise = promises.of_digest(connection, each.version.digest)
    threshold = each.question.least(None if promise is None else promise.threshold)
    (sure,) = task.confidences(logits, examples).values()
    assert each.question.type is not None
    return QuestionResult(
        question=each.question.name,
        version=str(each.version),
        digest=each.version.digest,
        column=each.column,
        type=each.question.type,
        examples=len(examples),
        metrics=metrics,
        threshold=threshold,
        threshold_of=None if threshold is None else "promise" if each.question.threshold is None else "question",
        bound=None if promise is None or promise.metric != "error" else promise.error,
        sureness=sure.sureness(threshold),
        details=_details(task, examples, [read.places[row] for row in right], logits, answers),
    )


def _confusion(task: Task, answers: Sequence[Answer], right: Sequence[Sequence[str]]) -> Confusions:
    from turret.tasks import metrics

    given = [str(task.prediction_of(answer)) for answer in answers]
    counts = metrics.confusion(given, [labels[0] for labels in right], task.labels)
    return Confusions(task.labels, tuple(map(tuple, counts)))


def _reliability(found: Confidences) -> Reliability:
    bins, fitted = reliability(found.sure, found.right), found.calibration
    if fitted is None:
        return Reliability(calibration_error(bins), bins)
    raw = calibration_error(reliability(found.raw, found.right))
    return Reliability(calibration_error(bins), bins, raw, fitted.temperature, fitted.examples)


def _coverage(task: Task, logits: Tensor, right: Sequence[Sequence[str]]) -> Coverage | None:
    """The measured coverage of label sets for `COVERAGE`; None if its calibration has too few examples."""
    try:
        return measure_coverage(COVERAGE, task.label_sets(logits, COVERAGE), right)
    except DataError:
        return None


# --- replay -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replayed:
    """Version b compared with version a on the same examples."""

    a: str
    b: str
    source: str
    score: str  # "accuracy", "ROUGE-L" or "passed"
    paired: Paired
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return describe_replay(self.paired, self.a, self.b, self.score)

    def as_json(self) -> JsonObject:
        shared = {"a": self.a, "b": self.b, "source": self.source, "score": self.score}
        return {**shared, "paired": self.paired.as_json(), "notes": list(self.notes), "text": self.text}


def replay(
    store: Store, a: str, b: str, source: str | None, columns: RoleColumns, say: Say = silent, device: str = "auto"
) -> Replayed:
    """Ask both versions, one after the other.

    Args:
        source: labelled examples; None: the golden examples that a's alias `production` requires.
        columns: keys of a recipe's `[data]`; only with `source`.
        device: where their bases compute.
    """
    first, second = store.resolve(a), store.resolve(b)
    if first.digest == second.digest:
        raise DataError(f"{a} and {b} are the same version, {first}: give two that differ")
    if columns and source is None:
        raise DataError("columns are named, and no data is: give a table of labelled examples")
    texts: list[Input] = []
    wanted: Sequence[golden.Example] = ()
    notes: Sequence[str] = ()
    score = "passed"
    if source is None:
        wanted = _golden(store, first, second)
        texts = [example.text for example in wanted]
    scores: list[list[float]] = []
    for version in (first, second):
        labelled = None if source is None else read_labelled(store, version, source, columns)
        with answering.mount_version(store, str(version), say, device) as ready:
            notes = [*(notes or (labelled.notes if labelled else ())), *ready.asking.notes]
            say(f"asking {version} {len(labelled.examples if labelled else texts)} examples")
            if labelled is not None:
                notes = [*notes, *trained_on_note(store, version, labelled.examples)]
                score = ready.task.metric_label
                texts = _asked_texts(labelled.examples, texts)
                scores.append(_scores(ready, labelled.examples))
            else:
                answers = answering.answers(ready, texts)
                given = map(ready.task.prediction_of, answers)
                scores.append([float(each.failure(said) is None) for each, said in zip(wanted, given, strict=True)])
        del ready  # free the first base before the second is loaded
    found = compare_scores(*scores)
    return Replayed(str(first), str(second), source or "golden examples", score, found, tuple(notes))


def _asked_texts(examples: Sequence[Example], before: Sequence[Input]) -> list[Input]:
    """The texts of some examples. before: those that the other version was asked; they must be equal."""
    texts = [each.asked for each in examples]
    if before and list(before) != texts:
        raise DataError("the two versions read this data as different tasks: compare versions of one kind")
    return texts


def _scores(ready: answering.Mounted, examples: Sequence[Example]) -> list[float]:
    """How well a version answers each example."""
    _, answers = ready.asking.evaluate(examples)
    return ready.task.scores([ready.task.prediction_of(each) for each in answers], examples)


def _golden(store: Store, first: Version, second: Version) -> Sequence[golden.Example]:
    """All golden examples that the first version's alias `production` requires.

    Raises:
        DataError: there are none, or one of the versions can never pass a set.
    """
    name = first.name
    digests = [gate.golden for gate in store.gate(name, PRODUCTION) if isinstance(gate, Golden)]
    sets = {digest: store.examples(digest) for digest in digests}
    if not sets:
        raise DataError(
            f"nothing to replay: {name}@{PRODUCTION} requires no golden examples; give a table of labelled examples, "
            f"or store some with `turret gate {name} {PRODUCTION} --golden FILE`"
        )
    for version in (first, second):
        for digest, golden_set in sets.items():
            if problem := golden.why_unfit(version, golden_set):
                raise DataError(
                    f"cannot replay: {golden.name_of(digest)} {problem}: give a table of labelled examples, or change "
                    f"the gate with `turret gate {name} {PRODUCTION}`"
                )
    return [example for golden_set in sets.values() for example in golden_set.examples]


DRAWS = 10_000  # of signs


@dataclass(frozen=True)
class Paired:
    """Version B against version A on the same examples."""

    examples: int
    a: float  # mean score
    b: float
    difference: float  # b - a
    low: float  # of the interval of the difference
    high: float
    level: float  # confidence level of the interval
    p: float
    test: str  # "McNemar" or "sign flip"
    only_a: int  # examples with a higher score of A
    only_b: int
    equal: int

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `undecided`, for B."""
        if self.p > 1 - self.level:
            return "undecided"
        return "better" if self.difference > 0 else "worse"

    def as_json(self) -> JsonObject:
        return {**asdict(self), "verdict": self.verdict}


def compare_scores(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Paired:
    """Compare two versions.

    Args:
        a: scores of the examples, (N,), between 0 and 1; more is better.
        b: scores of the same examples, (N,).
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    differences = second - first  # (N,)
    generator = np.random.default_rng(seed)
    found = interval(differences[None, :], generator)
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    binary = bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
    p = sign_test(only_a, only_b) if binary else sign_flips(differences, generator, DRAWS)
    return Paired(
        examples=len(differences),
        a=float(first.mean()),
        b=float(second.mean()),
        difference=float(differences.mean()),
        low=found.low,
        high=found.high,
        level=found.confidence,
        p=p,
        test="McNemar" if binary else "sign flip",
        only_a=only_a,
        only_b=only_b,
        equal=len(differences) - only_a - only_b,
    )


def describe_replay(result: Paired, a: str, b: str, score: str) -> str:
    """The result of a replay, on two lines."""
    counts = f"{b} is better on {result.only_b}, {a} on {result.only_a}, equal on {result.equal}"
    span = f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}], {result.test} p={result.p:.2g}"
    means = f"{score} {result.b:.3f} against {result.a:.3f}: {span}"
    return f"{counts} of {result.examples} examples ({means})\n{_worth(result, a, b)}"


def _worth(result: Paired, a: str, b: str) -> str:
    if result.verdict == "better":
        return f"{b} is better here: test it on live traffic with `turret experiment start`"
    if result.verdict == "worse":
        return f"{b} is worse here: do not test it on live traffic"
    half = (result.high - result.low) / 2
    return (
        f"no difference was found: {result.examples} examples do not show one below about {half:.3f}; "
        "use live traffic or more examples"
    )
