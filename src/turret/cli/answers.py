"""`turret predict` and `turret evaluate`: use a stored version."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.output import console, emit, grid, metrics, plainly, report, safe, span, status
from turret.errors import DataError, RecipeError
from turret.json_types import JsonMapping, JsonObject
from turret.tasks import Task, stored_task

if TYPE_CHECKING:
    from turret.workspace import Evaluation, Workspace

FILES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


def predict(
    reference: options.Ref,
    inputs: Annotated[
        list[str], typer.Argument(metavar="TEXT... | FILE", help="Texts, a table, a .txt file, or - for stdin.")
    ],
    column: Annotated[str | None, typer.Option("--column", help="Column of the table to read.")] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Ask the base alone, with the same prompt.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Answer texts with a stored version.

    Prints labels with probabilities, or generated texts.
    FILE is a .txt file with one input per line, or a table (.csv, .tsv, .jsonl, .json, .parquet).
    """
    from turret.workspace import Workspace

    workspace = Workspace(store)
    texts = _texts(workspace, reference, inputs, column)
    with status() as say:
        answers = workspace.predict(reference, texts, bare=bare, on_stage=say)
    if as_json:
        emit(list(answers))
    else:
        _print_answers(stored_task(workspace.resolve(reference).part("task")), texts, answers)


def evaluate(
    reference: options.Ref,
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, folder, Hub id or pypi: package.")],
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Measure a stored version on other data.

    Uses the test split if the data has one. If a column is not found, name it with --set data.text=COLUMN.
    """
    from turret.workspace import Workspace

    columns = data_columns(sets)
    with status() as say:
        found = Workspace(store).evaluate(reference, data, columns=columns, on_stage=say)
    report(found, as_json, _print_evaluation)


def _texts(workspace: Workspace, reference: str, inputs: Sequence[str], column: str | None) -> Sequence[str]:
    """The texts given on the command line, in a file or on stdin."""
    if len(inputs) == 1 and inputs[0] == "-":
        try:
            return [line.rstrip("\r\n") for line in sys.stdin]
        except UnicodeDecodeError:
            raise DataError("stdin is not UTF-8: give UTF-8 text with one input per line") from None
    if len(inputs) == 1 and _names_a_file(inputs[0]):
        return workspace.inputs(reference, inputs[0], column=column)
    if column is not None:
        raise DataError(f"--column {column} needs one table, given {len(inputs)} texts: give a table, or no --column")
    return inputs


def _names_a_file(word: str) -> bool:
    """Whether an input is a file and not a text. Raises DataError for a file that does not exist."""
    if not word.lower().endswith(FILES) or (" " in word and not Path(word).exists()):
        return False
    if not Path(word).exists():
        raise DataError(f"there is no file {word!r}: give a file, or the text itself")
    return True


def data_columns(sets: list[str] | None) -> JsonObject:
    """The keys of a recipe's `[data]` among the `--set` options. Raises RecipeError for any other key."""
    found: JsonObject = {}
    for key, value in options.overrides(sets).items():
        name = key.removeprefix("data.")
        if name not in ("text", "label", "document", "summary", "prompt", "completion", "test"):
            raise RecipeError(f"--set {key}: expected data.text, data.label, data.document, data.summary or data.test")
        found[name] = int(value) if name == "test" and value.isdigit() else value
    return found


def _print_answers(task: type[Task], texts: Sequence[str], answers: Sequence[JsonMapping]) -> None:
    for text, answer in zip(texts, answers, strict=True):
        shown = plainly(text)
        short = shown if len(shown) <= 72 else f"{shown[:69]}..."
        if task.generates:
            console().print(f"[dim]{safe(short)}[/]\n  {safe(task.line(answer))}")
        else:
            console().print(f"[bold]{safe(task.line(answer))}[/]  [dim]{safe(short)}[/]")


def _print_evaluation(found: Evaluation) -> None:
    console().print(f"[bold]{safe(found.version)}[/] on {safe(found.data['source'])}")
    rows = [("metrics", metrics(found.metrics)), ("examples", f"{found.data['examples']} in {span(found.seconds)}")]
    console().print(grid(rows + [("note", safe(note)) for note in found.notes]))
