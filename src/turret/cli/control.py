"""`turret control`: does the base write what it is asked for? Decode, call, encode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from turret.cli import options
from turret.cli.compare import Texts, say_titles
from turret.cli.output import columns, emit, safe, status, voice
from turret.cli.train import Base, Data, Kind, Name, Seed, Source, read_recipe

if TYPE_CHECKING:
    from rich.console import Console


def control(
    source: Source,
    aspects: Annotated[str, typer.Option("--aspects", help="Names with commas; {aspect} in the data stands for each.")],
    methods: Annotated[
        str | None, typer.Option("--methods", help="As in compare; base,prefix,lora if left out.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Trainings a method and aspect.")] = 1,
    judge: Annotated[str | None, typer.Option("--judge", help="Base of the classifier that judges outputs.")] = None,
    texts: Texts = True,
    base: Base = None,
    name: Name = None,
    data: Data = None,
    task: Kind = None,
    seed: Seed = None,
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Train an adapter an aspect on one base, and measure how often it writes what it is asked for.

    Judged by a classifier of aspects and by ROUGE against each aspect's reference. The same command again goes on.
    """
    from turret.workspace import Workspace

    recipe = read_recipe(source, base, name, data, task, None, None, seed, sets)
    wanted = [each.strip() for each in aspects.split(",") if each.strip()]
    with status() as live:
        found = Workspace(store).control(
            recipe, wanted, methods=methods, seeds=seeds, judge=judge, texts=texts, on_stage=say_titles(live)
        )
    emit(found.as_json()) if as_json else _print(found, voice(as_json))


def _print(found: Any, out: Console) -> None:
    from turret.compare.control_rates import headline

    out.print(f"[bold]{safe(headline(found))}[/]\n")
    heads = ("method", "by the classifier", "by ROUGE", "ROUGE-L, asked", "the others")
    rows = [
        (
            safe(each.label),
            _rate(each.by_classifier),
            _rate(each.by_rouge),
            f"{each.rouge_asked.mean:.1f}",
            f"{each.rouge_others:.1f}",
        )
        for each in found.rated
    ]
    out.print(columns(heads, rows, right=heads[1:]))
    for spec, why in found.failures.items():
        out.print(f"  [red]{safe(spec)}[/] did not run: {safe(why)}")
    out.print(f"\n[dim]chance {found.chance:.0f}%, the classifier on references {found.judge['accuracy']:.0f}%[/]")
    out.print(f"[dim]report[/] {safe(found.folder)}/report.html")


def _rate(found: Any) -> str:
    return f"{found.mean:.0f}% [dim]({found.low:.0f} to {found.high:.0f})[/]"
