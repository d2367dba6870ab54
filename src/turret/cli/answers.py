"""`turret predict` and `turret evaluate`: use a stored version."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.output import console, emit, grid, metrics, plainly, report, safe, span, status
from turret.data.files import is_table
from turret.errors import DataError, RecipeError
from turret.json_types import JsonMapping, JsonObject
from turret.tasks import Task, stored_task

if TYPE_CHECKING:
    from turret.data import Input
    from turret.workspace import Evaluation, Workspace

KEYS = (  # of [data], that say how a table is read
    "text", "label", "document", "summary", "prompt", "completion", "messages", "input", "system", "tools", "ignore",
    "encoding", "delimiter", "header", "sheet", "separator", "normalize_labels", "test",
)  # fmt: skip


def predict(
    reference: options.Ref,
    inputs: Annotated[
        list[str], typer.Argument(metavar="TEXT... | FILE", help="Texts, a table, a .txt file, or - for stdin.")
    ],
    text: options.Text = None,
    prompt: options.Prompt = None,
    messages: options.Messages = None,
    column: Annotated[str | None, typer.Option("--column", hidden=True, help="Old: --text or --prompt.")] = None,
    sets: options.Set = None,
    bare: Annotated[bool, typer.Option("--bare", help="Ask the base alone, with the same prompt.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Answer texts with a stored version.

    Prints labels with probabilities, or generated texts.
    FILE is a .txt file with one input per line, or a table (.csv, .tsv, .jsonl, .json, .xlsx, .parquet; .gz, .zst).
    """
    from turret.workspace import Workspace

    workspace = Workspace(store)
    named = data_columns(sets, options.columns(text=text, prompt=prompt, messages=messages))
    if column is not None:
        named |= _old_column(workspace, reference, column)
    texts = _texts(workspace, reference, inputs, named)
    with status() as say:
        answers = workspace.predict(reference, texts, bare=bare, on_stage=say)
    if as_json:
        emit(list(answers))
    else:
        _print_answers(stored_task(workspace.resolve(reference).part("task")), texts, answers)


def evaluate(
    reference: options.Ref,
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, folder, Hub id, pypi: package, or - for stdin.")],
    text: options.Text = None,
    label: options.Label = None,
    prompt: options.Prompt = None,
    completion: options.Completion = None,
    messages: options.Messages = None,
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Measure a stored version on other data.

    Uses the test split if the data has one, and the columns that the version was trained on unless others are named.
    """
    from turret.workspace import Workspace

    columns = data_columns(sets, options.columns(text, label, prompt, completion, messages))
    with status() as say:
        found = Workspace(store).evaluate(reference, data, columns=columns, on_stage=say)
    report(found, as_json, _print_evaluation)


def _old_column(workspace: Workspace, reference: str, column: str) -> JsonObject:
    """The column of `--column`, by the role that the version's task calls it. Prints a warning."""
    role = stored_task(workspace.resolve(reference).part("task")).schema().usual[0]
    option = "--text" if role == "text" else "--prompt"
    console(stderr=True).print(f"[yellow]--column is called {option} now, and will be removed in the next release[/]")
    return {role: column}


def _texts(workspace: Workspace, reference: str, inputs: Sequence[str], named: JsonMapping) -> Sequence[Input]:
    """The texts given on the command line, in a file or on stdin."""
    if len(inputs) == 1 and inputs[0] == "-":
        try:
            return [line.rstrip("\r\n") for line in sys.stdin]
        except UnicodeDecodeError:
            raise DataError("stdin is not UTF-8: give UTF-8 text with one input per line") from None
    if len(inputs) == 1 and _names_a_file(inputs[0]):
        return workspace.inputs(reference, inputs[0], columns=named)
    if named:
        raise DataError(
            f"a column is named, which needs one table, given {len(inputs)} texts: give a table, or name none"
        )
    return inputs


def _names_a_file(word: str) -> bool:
    """Whether an input is a file and not a text. Raises DataError for a file that does not exist."""
    named_so = is_table(Path(word)) or word.lower().endswith(".txt")
    if not named_so or (" " in word and not Path(word).exists()):
        return False
    if not Path(word).exists():
        raise DataError(f"there is no file {word!r}: give a file, or the text itself")
    return True


def data_columns(sets: list[str] | None, named: Mapping[str, str] | None = None) -> JsonObject:
    """The keys of a recipe's `[data]` among the `--set` options, and those of `options.columns`. Raises RecipeError."""
    from turret.recipe import Recipe

    texts = options.overrides(sets)
    for key in texts:
        if key.removeprefix("data.") not in KEYS:
            raise RecipeError(
                f"--set {key}: expected a key of [data], such as data.text; known here are {', '.join(KEYS)}"
            )
    read = Recipe(data="x").with_overrides({f"data.{key.removeprefix('data.')}": text for key, text in texts.items()})
    found = {key: value for key in KEYS if (value := getattr(read.data, key, None)) is not None}
    return found | {key.removeprefix("data."): column for key, column in (named or {}).items()}


def _print_answers(task: type[Task], texts: Sequence[Input], answers: Sequence[JsonMapping]) -> None:
    for text, answer in zip(texts, answers, strict=True):
        shown = plainly(str(text))
        short = shown if len(shown) <= 72 else f"{shown[:69]}..."
        if task.generates:
            console().print(f"[dim]{safe(short)}[/]\n  {safe(task.line(answer))}")
        else:
            console().print(f"[bold]{safe(task.line(answer))}[/]  [dim]{safe(short)}[/]")


def _print_evaluation(found: Evaluation) -> None:
    console().print(f"[bold]{safe(found.version)}[/] on {safe(found.data['source'])}")
    rows = [("metrics", metrics(found.metrics)), ("examples", f"{found.data['examples']} in {span(found.seconds)}")]
    console().print(grid(rows + [("note", safe(note)) for note in found.notes]))
