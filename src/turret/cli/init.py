"""`turret init`: write a recipe for a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turret.cli import options
from turret.cli.output import asks, console, emit, safe
from turret.cli.train import Base, Kind, Name
from turret.errors import RecipeError, SeveralLabels


def init(
    source: Annotated[str, typer.Argument(metavar="DATA", help="A table, folder, Hub id or pypi: package.")],
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="The recipe; - prints it. Default: NAME.toml.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    text: options.Text = None,
    text_pair: options.TextPair = None,
    label: options.Label = None,
    prompt: options.Prompt = None,
    completion: options.Completion = None,
    messages: options.Messages = None,
    base: Base = None,
    name: Name = None,
    task: Kind = None,
    sets: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Write a commented recipe from what a table shows.

    Finds the columns, the encoding, the separator and the classes. Then try `turret plan` and `turret train` with it.
    """
    from turret.recipe.toml import written
    from turret.workspace.drafting import draft

    if source == "-":
        raise RecipeError("turret init needs a file, because the recipe names it: save stdin to a file")
    columns = options.columns(text, text_pair, label, prompt, completion, messages)
    named = {"base": base, "name": name, "task.kind": task}
    settings = {f"data.{role}": each if isinstance(each, str) else written(each) for role, each in columns.items()}
    settings |= {key: value for key, value in named.items() if value is not None} | options.overrides(sets)
    try:
        found = draft(source, settings=settings)
    except SeveralLabels as error:
        if as_json or not asks():
            raise
        found = draft(source, settings=settings | {"data.label": _asked(error)})
    path = None if out == "-" else Path(out or f"{found.name}.toml")
    if path is not None:
        _write(path, found.text, force)
    if as_json:
        emit({**found.as_json(), "file": None if path is None else str(path)})
    elif path is None:
        typer.echo(found.text, nl=False)
    else:
        for note in found.notes:
            console().print(f"  [dim]note[/]  {safe(note)}")
        console().print(f"[bold]{safe(path)}[/]  [dim]try[/] turret plan {safe(path)}")


def _asked(error: SeveralLabels) -> str:
    """The column that the user chooses as the label."""
    from rich.prompt import IntPrompt

    out = console(stderr=True)
    out.print("Which column is the label?")
    names = list(error.columns)
    for number, name in enumerate(names, 1):
        classes = ", ".join(error.columns[name][:5])
        out.print(f"  {number}  [bold]{safe(name)}[/]  [dim]{safe(classes)}[/]")
    numbers = [str(number) for number in range(1, len(names) + 1)]
    try:
        return names[IntPrompt.ask("number", choices=numbers, default=1, console=out) - 1]
    except EOFError:
        raise error from None


def _write(path: Path, text: str, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(
            f"{str(path)[:100]!r} exists: give --force to replace it, or --out for another file"
        ) from None
    except OSError as error:
        raise RecipeError(
            f"{str(path)[:100]!r} cannot be written: {error.strerror}: give --out for another file"
        ) from None
