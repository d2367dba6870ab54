"""`turret train` and `turret plan`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.output import TYPED, console, emit, safe, status
from turret.cli.queue import queued
from turret.errors import RecipeError
from turret.tasks.task import kinds

if TYPE_CHECKING:
    from turret.recipe import Recipe

Source = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE | DATA", help="A recipe (.toml or a preset), or a table, folder, Hub id, pypi: or -."
    ),
]
Base = Annotated[
    str | None, typer.Option("--base", help="A Hub id, folder, .gguf file or pypi: package; default: by task.")
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the adapter in the store.")]
Data = Annotated[str | None, typer.Option("--data", help="Data that replaces the recipe's.")]
Kind = Annotated[str | None, typer.Option("--task", help=f"{kinds()}.")]
Method = Annotated[str | None, typer.Option("--method", help="lora, prefix, head, full or peft.")]
Rate = Annotated[str | None, typer.Option("--lr", help="Peak learning rate, or auto to find it by short trials.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of all random numbers.")]


def train(
    source: Source,
    text: options.Text = None,
    text_pair: options.TextPair = None,
    label: options.Label = None,
    prompt: options.Prompt = None,
    completion: options.Completion = None,
    messages: options.Messages = None,
    base: Base = None,
    name: Name = None,
    data: Data = None,
    task: Kind = None,
    method: Method = None,
    lr: Rate = None,
    seed: Seed = None,
    device: options.TrainDevice = None,
    sets: options.Set = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not resume an unfinished run.")] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Leave it to a `turret worker` of this store.")] = False,
    priority: Annotated[int, typer.Option("--priority", help="In the queue, -100 to 100; higher is earlier.")] = 0,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Train an adapter and store it.

    Prints the recipe and the plan, then progress, then the stored version and what to try next.
    After a kill or Ctrl-C the same command resumes from the last checkpoint.
    """
    from turret.cli.progress import Progress
    from turret.workspace import Workspace

    columns = options.columns(text, text_pair, label, prompt, completion, messages)
    recipe = read_recipe(source, base, name, data, task, method, lr, seed, sets, columns, device)
    if queue:
        run = Workspace(store).queue.submit(recipe, priority=priority)
        emit(run) if as_json else queued(run)
        return
    with Progress(as_json) as progress:
        result = Workspace(store).train(
            recipe,
            on_record=progress.record,
            on_plan=progress.planned,
            on_stage=progress.stage,
            on_warning=progress.warning,
            fresh=fresh,
        )
    emit(result.as_json()) if as_json else progress.stored(result, str(store))


def plan(
    source: Source,
    text: options.Text = None,
    text_pair: options.TextPair = None,
    label: options.Label = None,
    prompt: options.Prompt = None,
    completion: options.Completion = None,
    messages: options.Messages = None,
    base: Base = None,
    name: Name = None,
    data: Data = None,
    task: Kind = None,
    method: Method = None,
    lr: Rate = None,
    seed: Seed = None,
    device: options.TrainDevice = None,
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Check a training without training.

    Prints the filled recipe and the checks, with the trainable share and the predicted memory and time.
    """
    from turret.cli.progress import print_plan
    from turret.workspace import Workspace

    columns = options.columns(text, text_pair, label, prompt, completion, messages)
    recipe = read_recipe(source, base, name, data, task, method, lr, seed, sets, columns, device)
    with status() as show:
        planned = Workspace(store).plan(recipe, on_stage=show)
    if as_json:
        emit(planned.as_json())
    else:
        print_plan(planned, console(stderr=as_json))
        if not planned.plan.refused:
            words = list(TYPED)
            words[words.index("plan")] = "train"
            console().print(f"start it with  {safe(shlex.join(['turret', *words]))}", soft_wrap=True)
    if planned.plan.refused:
        raise typer.Exit(1)


def read_recipe(
    source: str,
    base: str | None,
    name: str | None,
    data: str | None,
    task: str | None,
    method: str | None,
    lr: str | None,
    seed: int | None,
    sets: list[str] | None,
    columns: Mapping[str, str | list[str]] | None = None,
    device: str | None = None,
) -> Recipe:
    """The recipe of a file, a preset or data, with the options and then `--set` applied. Raises RecipeError.

    Args:
        columns: role -> column, from `options.columns`.
    """
    from turret.recipe import Recipe, presets

    named = {"base": base, "name": name, "data.source": data, "task.kind": task, "method.kind": method}
    named |= {"train.lr": lr, "train.device": device, "seed": None if seed is None else str(seed)}
    changes = {key: value for key, value in named.items() if value is not None} | options.overrides(sets)
    if source.endswith(".toml") or (source in presets() and not Path(source).exists()):
        return _with_columns(Recipe.load(source).with_overrides(changes), columns)
    if data is not None:
        raise RecipeError(
            f"two sources of data, {source!r} and --data {data!r}: give one of them, or a recipe with --data"
        )
    start = {"data": {"source": source}} | {key: changes.pop(key) for key in ("base", "name") if key in changes}
    return _with_columns(Recipe.model_validate(start).with_overrides(changes), columns)


def _with_columns(recipe: Recipe, columns: Mapping[str, str | list[str]] | None) -> Recipe:
    """The recipe with other columns. Their names are taken as they are, so that one may be called `none` or `1`."""
    if not columns:
        return recipe
    settings = recipe.model_dump(mode="python")
    return type(recipe).model_validate({**settings, "data": {**settings["data"], **columns}})
