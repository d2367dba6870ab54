"""`turret predict` and `turret evaluate`: a stored version at work. Decode, call, encode."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turret.cli import options
from turret.cli.output import console, emit, grid, metrics, plainly, safe, span, status
from turret.errors import DataError, RecipeError
from turret.tasks import Task, stored_task

if TYPE_CHECKING:
    from turret.workspace import Evaluation, Workspace

FILES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
Ref = Annotated[str, typer.Argument(metavar="REF", help="name, name@3 or name@production")]


def predict(
    reference: Ref,
    inputs: Annotated[list[str], typer.Argument(metavar="TEXT... | FILE", help="Texts, a table, a .txt, or - .")],
    column: Annotated[str | None, typer.Option("--column", help="Column of the table to read.")] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Ask the base alone, with the same prompt.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Answer texts with a stored version.

    Prints labels with probabilities, or generated text.
    A FILE is a .txt with an input a line, or a table (.csv, .tsv, .jsonl, .json, .parquet); - reads lines from stdin.
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
    reference: Ref,
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, folder, Hub id or pypi: package.")],
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Measure a stored version on other data.

    Takes the test split where the data has splits; --set data.text=COLUMN where a column is not obvious.
    """
    from turret.workspace import Workspace

    columns = data_columns(sets)
    with status() as say:
        found = Workspace(store).evaluate(reference, data, columns=columns, on_stage=say)
    if as_json:
        emit(found.as_json())
    else:
        _print_evaluation(found)


def _texts(workspace: Workspace, reference: str, inputs: Sequence[str], column: str | None) -> Sequence[str]:
    """The inputs themselves, or those in the one file that they name."""
    if len(inputs) == 1 and inputs[0] == "-":
        try:
            return [line.rstrip("\r\n") for line in sys.stdin]
        except UnicodeDecodeError:
            raise DataError("stdin is not UTF-8: give UTF-8 text, a line an input") from None
    if len(inputs) == 1 and _names_a_file(inputs[0]):
        return workspace.inputs(reference, inputs[0], column=column)
    if column is not None:
        raise DataError(f"--column {column} needs one table to read it from, given {len(inputs)} texts")
    return inputs


def _names_a_file(word: str) -> bool:
    """Whether the one input is a file, and not a text that should be answered; a file that is not there is an error."""
    if not word.lower().endswith(FILES) or (" " in word and not Path(word).exists()):
        return False
    if not Path(word).exists():
        raise DataError(f"there is no file {word!r}: give a file, or the text itself")
    return True


def data_columns(sets: list[str] | None) -> dict[str, Any]:
    found = {}
    for key, value in options.overrides(sets).items():
        name = key.removeprefix("data.")
        if name not in ("text", "label", "document", "summary", "prompt", "completion", "test"):
            raise RecipeError(
                f"--set {key}: evaluate knows data.text, data.label, data.document, data.summary, data.test"
            )
        found[name] = int(value) if name == "test" and value.isdigit() else value
    return found


def _print_answers(task: type[Task], texts: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> None:
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
