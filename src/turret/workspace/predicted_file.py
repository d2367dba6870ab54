"""Answer the rows of a table and write them, with their own columns, the answer and flags, to another file.

Or choose the rows to label next: those that a version is least sure of, spread over their texts.
"""

from __future__ import annotations

import heapq
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from turret.data import Input, TextPair
from turret.data.columns import RoleColumns
from turret.data.dataset import Row, Rows
from turret.data.table import CellValue
from turret.data.table_writer import TableWriter, check_target, form_of
from turret.errors import AdapterError, DataError
from turret.json_types import JsonObject
from turret.store import Store, Version, promises
from turret.tasks import TASKS, Prediction, Task, stored_task
from turret.tasks.shapes import Answer, TaskSpec
from turret.workspace.answering import (
    Mounted,
    PredictOptions,
    check_options,
    mount_version,
    other_labels,
    ranked_labels,
)
from turret.workspace.progress import Say
from turret.workspace.reading import read_rows, trained_on
from turret.workspace.results import Predicted, Suggested, Suggestion

ROWS = 512  # that are answered at a time
SAMPLED = 100  # rows that show how the table writes numbers
BLANK, CUT = "blank", "cut"
PERSON = "to a person"  # the column of answers that abstain


def predict_file(
    store: Store, reference: str, source: str, out: str | Path, options: PredictOptions | None, say: Say
) -> Predicted:
    """Answer every row. The file appears when all rows are answered.

    Raises:
        DataError: the table cannot be read, or the file cannot be written.
        AdapterError: the version does not give what the request asks for.
    """
    started, path, request = time.perf_counter(), Path(out).expanduser(), options or PredictOptions()
    version = store.resolve(reference)
    check_target(path)
    check_options(version, request.top, request.coverage)
    rows = read_rows(store, version, source, request.columns)
    first = list(islice(rows.read(), SAMPLED))  # an error in a column or in these rows costs no load of the base
    form = form_of(source, rows.table.found, (row.cells for row in first), path)
    with store.database().reading() as connection:
        promised = promises.of_digest(connection, version.digest) is not None and not request.bare
    names = _names(rows.table.columns, version.task, request, promised=promised)
    new = [key for key in names if key != "row"]
    counts = dict.fromkeys(("rows", BLANK, CUT, PERSON), 0)
    with (
        mount_version(store, str(version), say, request.device) as ready,
        TableWriter(path, [*rows.table.columns, names["row"], *(names[key] for key in new)], form) as table,
    ):
        reader = rows.read()
        while some := list(islice(reader, ROWS)):
            say(f"answering rows {counts['rows'] + 1} to {counts['rows'] + len(some)}")
            for row, answer in zip(some, _answer_rows(ready, some, request), strict=True):
                counts["rows"] += 1
                counts[PERSON] += PERSON in answer
                for flag in answer["flags"]:
                    counts[flag] += 1
                own = dict(zip(rows.table.columns, row.cells, strict=True))
                table.write(own | {names["row"]: row.place} | {names[key]: answer.get(key) for key in new})
    return Predicted(
        version=str(version),
        out=str(path),
        columns=list(table.columns),
        rows=counts["rows"],
        blank=counts[BLANK],
        cut=counts[CUT],
        to_a_person=counts[PERSON] if promised else None,
        guarded=table.guarded,
        seconds=time.perf_counter() - started,
        notes=_notes(rows, table),
    )


def _answer_rows(ready: Mounted, rows: Sequence[Row], request: PredictOptions) -> Iterator[JsonObject]:
    """The values of the new columns, by key, and the flags. A blank input is not answered."""
    asked = [place for place, row in enumerate(rows) if str(row.input).strip()]
    inputs = [rows[place].input for place in asked]
    found = ready.asking.answers_and_cuts(inputs, bare=request.bare, coverage=request.coverage) if asked else []
    by_row = dict(zip(asked, found, strict=True))
    for place in range(len(rows)):
        if place not in by_row:
            yield {"flags": [BLANK]}
            continue
        answer, cut = by_row[place]
        person = {} if ready.promise is None or not ready.with_abstain(answer)["abstain"] else {PERSON: "yes"}
        yield _values(ready.task, answer, request.top) | {"flags": [CUT] if cut else []} | person


def _values(task: Task, answer: Answer, top: int) -> JsonObject:
    given = task.prediction_of(answer)
    whole = next((answer[key] for key in ("value", "embedding") if key in answer), given)
    values: JsonObject = {"predicted": whole, "finish_reason": answer.get("finish_reason")}
    values["label_set"] = answer.get("label_set")
    if ranked := ranked_labels(answer):
        chances = dict(ranked)
        own = [round(chances[label], 6) for label in (given if isinstance(given, list) else [given])]
        values["probability"] = own if isinstance(given, list) else own[0]
        for number, (label, chance) in enumerate(other_labels(task, answer)[: top - 1], 2):
            values |= {f"predicted_{number}": label, f"probability_{number}": round(chance, 6)}
    for question, each in answer.get("answers", {}).items():
        values[f"predicted_{question}"] = each["label"]
        values[f"probability_{question}"] = round(each["probabilities"][each["label"]], 6)
    return values


def _names(columns: Sequence[str], spec: TaskSpec, request: PredictOptions, *, promised: bool) -> dict[str, str]:
    """The new columns by key. promised: whether the version has a promise."""
    task = stored_task(spec)
    asked = task.questions(spec.get("labels") or ())
    keys = [f"{name}_{question}" for question in asked for name in ("predicted", "probability")] or ["predicted"]
    if task.generates:
        keys.append("finish_reason")
    elif task.ranks_labels:
        keys.append("probability")
        keys += [f"{name}_{number}" for number in range(2, request.top + 1) for name in ("predicted", "probability")]
        keys += ["label_set"] if request.coverage is not None else []
        keys += [PERSON] if promised else []
    return unused_names(["row", *keys, "flags"], columns)


def unused_names(keys: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """The name of a new column for each key; with `turret_` in front if the table has a column of that name."""
    names = dict[str, str]()
    for key in keys:
        names[key] = key
        while names[key] in columns:
            names[key] = f"turret_{names[key]}"
    return names


def _notes(rows: Rows, table: TableWriter) -> list[str]:
    notes = [*rows.table.notes, *rows.table.left_out_notes()]
    if table.guarded:
        notes.append(
            f"{table.guarded} cells begin like a formula of a spreadsheet and have a ' in front; a .jsonl file keeps "
            "them unchanged"
        )
    if table.shortened:
        notes.append(f"{table.shortened} texts are longer than a cell of a workbook, and are cut there; write .csv")
    if table.encoding != table.form.encoding:
        notes.append(f"the answers have letters that {table.form.encoding} lacks, so the file is UTF-8")
    return notes


# --- labels to suggest ------------------------------------------------------------------------------------------------


MOST = 1000  # rows of one call
TIMES = 10  # as many of the least sure rows are kept to choose from


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answered row. Its text is read again if it is chosen, so long texts take no memory here."""

    number: int  # of the row in the table, from 0
    ids: Tensor  # the tokens that were read
    predicted: Prediction
    margin: float  # from 0, as unsure as possible, to 1
    confidence: float


def suggest(
    store: Store, reference: str, source: str, columns: RoleColumns, most: int, device: str, say: Say
) -> Suggested:
    """The rows to label next, the least sure first.

    Raises:
        AdapterError: the answers of the version have no probabilities.
        DataError: the table cannot be read, or has no text to label.
    """
    started, version = time.perf_counter(), store.resolve(reference)
    if not 1 <= most <= MOST:
        raise DataError(f"--most {most}: expected 1 to {MOST} rows to label")
    _require_probabilities(version)
    rows = read_rows(store, version, source, columns)
    next(rows.read(), None)  # an error in the first row costs no load of the base
    with mount_version(store, str(version), say, device) as ready:
        unsure, counts = _least_sure(ready, rows, TIMES * most, say)
        if not unsure:
            raise DataError(f"{rows.table.name} has no text to label: expected at least one row that is not blank")
        if len(unsure) > most:
            say(f"choosing {most} of the {len(unsure)} rows that it is least sure of")
            vectors = ready.asking.embeddings([each.ids for each in unsure]).numpy()
            unsure = [unsure[place] for place in spread_rows(vectors, [each.margin for each in unsure], most)]
        notes = [note for note in ready.asking.base.notes if note.startswith("computes on ")] + ready.asking.notes
    return Suggested(
        version=str(version),
        rows=counts["rows"],
        blank=counts["blank"],
        repeated=counts["repeated"],
        suggestions=_with_texts(unsure, rows),
        seconds=time.perf_counter() - started,
        notes=[*rows.table.notes, *rows.table.left_out_notes(), *notes],
        columns=rows.asked,
        label=str(trained_on(version).get("label") or "label"),
    )


def write_suggestions(found: Suggested, path: Path) -> TableWriter:
    """Write the suggestions as a table with an empty column for the labels, and return its writer."""
    names = unused_names(["row", "predicted", "confidence"], (*found.columns, found.label))
    with TableWriter(
        path, [names["row"], *found.columns, found.label, names["predicted"], names["confidence"]]
    ) as table:
        for each in found.suggestions:
            texts = dict(zip(found.columns, each.texts, strict=True))
            answer: dict[str, CellValue] = {
                names["predicted"]: each.predicted,
                names["confidence"]: round(each.confidence, 6),
            }
            table.write({**texts, names["row"]: each.row, **answer})
    return table


def spread_rows(vectors: NDArray[np.float32], margins: Sequence[float], most: int) -> list[int]:
    """The places of `most` rows, one from each part of the space of texts, by rising margin.

    k-means with `most` clusters, where a row weighs 1 - margin; of each cluster the row nearest to its centre.

    Source: Zhdanov 2019, "Diverse mini-batch Active Learning"; the margin is that of Scheffer et al. 2001.

    Args:
        vectors: of unit length, of rows that the model is not sure of: (M, D), M > most.
        margins: (M,), from 0 to 1.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    order = np.argsort(margins, kind="stable")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal vectors: some clusters stay empty
        means = KMeans(most, n_init=1, random_state=0).fit(vectors, sample_weight=1.001 - np.asarray(margins))
    far = np.square(vectors - means.cluster_centers_[means.labels_]).sum(1)  # (M,)
    nearest = {int(means.labels_[place]): int(place) for place in sorted(order, key=lambda place: -far[place])}
    chosen = set(nearest.values())
    rest = (int(place) for place in order if int(place) not in chosen)
    chosen.update(islice(rest, most - len(chosen)))
    return [int(place) for place in order if int(place) in chosen]


def _require_probabilities(version: Version) -> None:
    """Raise AdapterError unless the answers of a version have probabilities."""
    task = stored_task(version.task)
    if not task.ranks_labels:
        able = ", ".join(each.kind for each in TASKS.values() if each.ranks_labels)
        raise AdapterError(
            f"{version} has the task {task.kind}, whose answers have no probability to compare rows by: give a version "
            f"of {able}, or label rows that you draw by chance"
        )


def _least_sure(ready: Mounted, rows: Rows, most: int, say: Say) -> tuple[list[Candidate], dict[str, int]]:
    """The rows with the smallest margins, by rising margin, and the numbers of rows read, blank and repeated."""
    task = ready.task
    assert task.ranks_labels
    kept: list[tuple[float, int, Candidate]] = []  # a heap: the surest first
    counts, seen, numbered = dict.fromkeys(("rows", "blank", "repeated"), 0), set[bytes](), enumerate(rows.read())
    while some := list(islice(numbered, ROWS)):
        say(f"answering rows {counts['rows'] + 1} to {counts['rows'] + len(some)}")
        counts["rows"] += len(some)
        new: list[tuple[int, Input]] = []
        for number, row in some:
            text = str(row.input)
            digest = blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
            if not text.strip():
                counts["blank"] += 1
            elif digest in seen:
                counts["repeated"] += 1
            else:
                seen.add(digest)
                new.append((number, row.input))
        answers = ready.asking.answers([asked for _, asked in new]) if new else []
        for (number, asked), answer in zip(new, answers, strict=True):
            margin, confidence = task.certainty(answer)
            if len(kept) == most and kept[0][:2] > (-margin, -number):
                continue
            (read,) = task.encode_sources([asked])
            entry = (-margin, -number, Candidate(number, read.ids, task.prediction_of(answer), margin, confidence))
            heapq.heappush(kept, entry) if len(kept) < most else heapq.heapreplace(kept, entry)
    return [each for _, _, each in sorted(kept, reverse=True)], counts


def _with_texts(chosen: Sequence[Candidate], rows: Rows) -> list[Suggestion]:
    """The chosen rows with their texts, from a second reading."""
    last = max(each.number for each in chosen)
    wanted = {each.number for each in chosen}
    found = {number: row for number, row in enumerate(islice(rows.read(), last + 1)) if number in wanted}
    return [
        Suggestion(found[each.number].place, tuple(_texts(found[each.number].input)), each.predicted, each.confidence)
        for each in chosen
    ]


def _texts(asked: Input) -> Iterator[str]:
    if isinstance(asked, TextPair):
        yield from (asked.text, asked.text_pair)
    else:
        yield str(asked)
