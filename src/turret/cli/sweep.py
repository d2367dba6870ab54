"""`turret sweep`: search settings of a recipe by several trainings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.compare import duration, on_training
from turret.cli.output import columns, console, offer, report, safe, status
from turret.cli.train import Base, Data, Kind, Name, Seed, Source, read_recipe

if TYPE_CHECKING:
    from turret.workspace.sweeping import Sweep

SHOWN = 10


def sweep(
    source: Source,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUES", help="A range 1e-4..1e-2, a list 4,8,16, or a value; repeatable."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Trainings; default: all of the lists, or 20 with a range.")
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Time for new trainings: 30m, 2h, 90s.")] = None,
    on: options.On = None,
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="Trainings at a time, with --on.")] = 4,
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
    seed: Seed = None,
    device: options.TrainDevice = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Search the best settings of a recipe. The validation split judges; the test split is never used.

    Lists are tried in all combinations, if --trials allows it. Otherwise Optuna proposes settings and ends trainings
    that fall behind (pip install 'turret[sweep]'). Run the command again to continue.
    The last line trains the best recipe.
    """
    from turret.workspace import Workspace

    named = options.columns(text, text_pair, label, prompt, completion, messages)
    recipe = read_recipe(source, base, name, data, task, None, None, seed, None, named, device)
    limit = None if budget is None else duration(budget)
    with status() as show:
        found = Workspace(store).sweep(
            recipe,
            options.overrides(sets),
            trials=trials,
            at_once=at_once,
            budget=limit,
            on=on,
            on_stage=on_training(show),
        )
    report(found, as_json, _print)
    if not as_json:
        offer([f"train {found.file}"], store)


def _print(found: Sweep) -> None:
    out, ranked = console(), found.ranked
    keys = list(ranked[0].settings)
    rows = [
        (str(each.number + 1), *(_shown(each.settings[key]) for key in keys), f"{each.value:.4f}")
        for each in ranked[:SHOWN]
    ]
    heads = ("trial", *keys, f"{found.metric} (validation)")
    out.print(columns(heads, rows, right=("trial", heads[-1])))
    pruned = sum(each.state == "pruned" for each in found.trials)
    failed = sum(each.state == "failed" for each in found.trials)
    out.print(f"{len(ranked)} finished, {pruned} ended early, {failed} failed, {found.missing} missing")


def _shown(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else safe(str(value))
