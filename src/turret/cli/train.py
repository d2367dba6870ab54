"""`turret init`, `plan` and `train`: from a table to a stored version."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from turret.cli import options
from turret.cli.output import TYPED, asks, console, emit, safe, status
from turret.cli.queue import queued
from turret.errors import RecipeError, SeveralLabels


def train(
    *,
    source: options.Source,
    training: options.Training,
    fresh: Annotated[bool, Option(help="Do not resume an unfinished run.")] = False,
    queue: Annotated[bool, Option(help="Leave it to a `turret worker` of this store.")] = False,
    priority: Annotated[int, Option(help="In the queue, -100 to 100; higher is earlier.")] = 0,
    command: options.Command,
) -> None:
    """Train an adapter and store it.

    Prints the recipe and the plan, then progress, then the stored version and what to try next.
    After a kill or Ctrl-C the same command resumes from the last checkpoint.
    """
    from turret.cli.progress import Progress

    recipe = training.recipe(source)
    if queue:
        run = command.workspace.queue.submit(recipe, priority=priority)
        command.say(run, queued(run))
        return
    with Progress(command.as_json) as progress:
        result = command.workspace.train(
            recipe,
            on_record=progress.record,
            on_plan=progress.planned,
            on_stage=progress.stage,
            on_warning=progress.warning,
            fresh=fresh,
        )
    command.report(result, lambda stored: progress.stored(stored, str(command.store)))


def plan(source: options.Source, training: options.Training, command: options.Command) -> None:
    """Check a training without training.

    Prints the filled recipe and the checks, with the trainable share and the predicted memory and time.
    """
    from turret.cli.progress import print_plan

    recipe = training.recipe(source)
    with status() as show:
        planned = command.workspace.plan(recipe, on_stage=show)
    command.report(planned, lambda each: print_plan(each, console()))
    if planned.plan.refused:
        raise typer.Exit(1)
    if not command.as_json:
        words = list(TYPED)
        words[words.index("plan")] = "train"
        console().print(f"start it with  {safe(shlex.join(['turret', *words]))}", soft_wrap=True)


def init(
    *,
    source: Annotated[str, Argument(metavar="DATA", help="A table, folder, Hub id or pypi: package.")],
    out: Annotated[str | None, Option(metavar="FILE", help="The recipe; - prints it. Default: NAME.toml.")] = None,
    force: Annotated[bool, Option(help="Replace a file that exists.")] = False,
    training: Annotated[options.Training, options.Without(("data", "method", "lr", "seed", "device"))],
    as_json: options.Json = False,
) -> None:
    """Write a commented recipe from what a table shows.

    Finds the columns, the encoding, the separator and the classes. Then try `turret plan` and `turret train` with it.
    """
    from turret.recipe.toml import written
    from turret.workspace.drafting import draft

    if source == "-":
        raise RecipeError("turret init needs a file, because the recipe names it: save stdin to a file")
    columns = training.columns.named()
    settings = {f"data.{role}": each if isinstance(each, str) else written(each) for role, each in columns.items()}
    settings |= training.changes()
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
