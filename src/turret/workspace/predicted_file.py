"""Answer the rows of a table and write them, with their own columns, the answer and flags, to another file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from turret.data.dataset import Row, Rows
from turret.data.table_writer import TableWriter, check_target, form_of
from turret.json_types import JsonObject
from turret.store import Store, Version, promises
from turret.tasks import Task, stored_task
from turret.tasks.shapes import Answer, TaskSpec
from turret.workspace.answering import PredictOptions, check_options, ranked_labels
from turret.workspace.progress import Say
from turret.workspace.reading import read_rows
from turret.workspace.results import Predicted

if TYPE_CHECKING:
    from turret.workspace.answering import Mounted

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
        _mounted(store, version, say, request.device) as ready,
        TableWriter(path, [*rows.table.columns, names["row"], *(names[key] for key in new)], form) as table,
    ):
        reader = rows.read()
        while some := list(islice(reader, ROWS)):
            say(f"answering rows {counts['rows'] + 1} to {counts['rows'] + len(some)}")
            for row, answer in zip(some, _answered(ready, some, request), strict=True):
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


def _mounted(store: Store, version: Version, say: Say, device: str) -> Mounted:
    from turret.workspace import answering  # loads torch

    return answering.mounted(store, str(version), say, device)


def _answered(ready: Mounted, rows: Sequence[Row], request: PredictOptions) -> Iterator[JsonObject]:
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
        person = {} if ready.promise is None or not ready.decided(answer)["abstain"] else {PERSON: "yes"}
        yield _values(ready.task, answer, request.top) | {"flags": [CUT] if cut else []} | person


def _values(task: Task, answer: Answer, top: int) -> JsonObject:
    given = task.judged(answer)
    whole = next((answer[key] for key in ("value", "embedding") if key in answer), given)
    values: JsonObject = {"predicted": whole, "finish_reason": answer.get("finish_reason")}
    values["label_set"] = answer.get("label_set")
    if ranked := ranked_labels(answer):
        chances = dict(ranked)
        own = [round(chances[label], 6) for label in (given if isinstance(given, list) else [given])]
        values["probability"] = own if isinstance(given, list) else own[0]
        for number, (label, chance) in enumerate(ranked[1:top], 2):
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
    return unused(["row", *keys, "flags"], columns)


def unused(keys: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
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
