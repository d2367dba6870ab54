"""Measure a stored version on other data, and find what it gets wrong. Loads torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from turret.compare.evaluation_page import as_html
from turret.compare.results import (
    Confusions,
    Coverage,
    Details,
    Reliability,
    covered,
)
from turret.data import Example
from turret.data.table_writer import TableWriter
from turret.errors import DataError
from turret.json_types import JsonMapping, JsonObject
from turret.store import Store
from turret.tasks import Task
from turret.tasks.calibration import Confidences, calibration_error, reliability
from turret.train.batches import EncodedRows
from turret.workspace.answering import Mounted, mounted
from turret.workspace.comparing.kept_files import write_text
from turret.workspace.progress import Say, silent
from turret.workspace.reading import LabelledData
from turret.workspace.results import Evaluation

COVERAGE = 0.9  # of the sets of labels that an evaluation measures


def evaluate(
    store: Store, reference: str, labelled: LabelledData, say: Say = silent, device: str = "auto"
) -> Evaluation:
    """Metrics and mistakes of a version on labelled examples. device: where the base computes."""
    with mounted(store, reference, say, device, judged=True) as ready:
        assert ready.version is not None
        say(f"answering {len(labelled.examples)} examples")
        started = time.perf_counter()
        metrics, details = _measure(ready, labelled.examples, labelled.places)
        notes = [note for note in ready.notes if note.startswith("computes on ")]
        notes += ready.asking.notes
        return Evaluation(
            version=str(ready.version),
            digest=ready.version.digest,
            data={"source": labelled.data.source, "examples": len(labelled.examples)},
            metrics=metrics,
            seconds=time.perf_counter() - started,
            notes=[*labelled.notes, *notes],
            details=details,
        )


def write_mistakes(found: Evaluation, path: Path) -> TableWriter:
    """Write every wrong answer of an evaluation into a table, a row each, and return its writer."""
    rows = [each.as_json() for each in found.details.mistakes]
    says = [] if any(row["confidence"] is not None for row in rows) else ["error"]  # else it is the confidence
    texts = ["text", "text_pair"] if any("text_pair" in row for row in rows) else ["text"]
    with TableWriter(path, ["row", "right", "given", "confidence", "score", *says, *texts]) as table:
        for row in rows:
            confidence = None if row["confidence"] is None else round(row["confidence"], 6)
            table.write(row | {"confidence": confidence, "score": round(row["score"], 6)})
    return table


def write_page(found: Evaluation, path: Path, *, texts: bool = True) -> None:
    """Write an evaluation as one self-contained page.

    Args:
        texts: whether it shows texts of the data.
    """
    page = as_html(
        version=found.version,
        digest=found.digest,
        source=str(found.data["source"]),
        examples=int(found.data["examples"]),
        metrics=found.metrics,
        details=found.details,
        notes=found.notes,
        texts=texts,
    )
    write_text(path, page)


def _measure(ready: Mounted, examples: Sequence[Example], places: Sequence[int]) -> tuple[JsonObject, Details]:
    task = ready.task
    known = ready.asking.logits(EncodedRows(task, examples).windows()) if task.calibrates else None
    metrics, answers = ready.asking.evaluate(examples, logits=known)
    mistakes = tuple(replace(each, row=places[each.row]) for each in task.worst(examples, answers))
    numbers = tuple(task.numbers(examples, answers))
    details = Details(mistakes, task.kind, numbers=numbers)
    if known is None:
        return metrics, details
    sure = task.confidences(known, examples)
    details = replace(details, reliability={question: _reliability(each) for question, each in sure.items()})
    if not task.ranks_labels:
        return metrics, details
    right = [example.labels for example in examples]
    return metrics, replace(
        details,
        confusion=None if task.multi_label else _confusion(task, answers, right),
        coverage=None if task.calibration is None else _coverage(task, known, right),
    )


def _confusion(task: Task, answers: Sequence[JsonMapping], right: Sequence[Sequence[str]]) -> Confusions:
    from turret.tasks import metrics

    given = [str(task.judged(answer)) for answer in answers]
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
        return covered(COVERAGE, task.label_sets(logits, COVERAGE), right)
    except DataError:
        return None
