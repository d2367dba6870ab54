"""`turret control`: measure how often an adapter writes about the aspect that it was trained for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.compare import Texts, on_training
from turret.cli.output import columns, console, report, safe, status
from turret.cli.train import Base, Data, Kind, Name, Seed, Source, read_recipe

if TYPE_CHECKING:
    from turret.compare.control_rates import Control
    from turret.compare.evidence import Interval


def control(
    source: Source,
    aspects: Annotated[str, typer.Option("--aspects", help="Names with commas; each replaces {aspect} in the data.")],
    methods: Annotated[str | None, typer.Option("--methods", help="As in compare; default: base,prefix,lora.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Trainings per method and aspect.")] = 1,
    judge: Annotated[str | None, typer.Option("--judge", help="Base of the classifier that judges outputs.")] = None,
    texts: Texts = True,
    prompt: options.Prompt = None,
    completion: options.Completion = None,
    messages: options.Messages = None,
    base: Base = None,
    name: Name = None,
    data: Data = None,
    task: Kind = None,
    seed: Seed = None,
    device: options.TrainDevice = None,
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Train an adapter for each aspect, and measure how often it writes about its aspect.

    A classifier judges the outputs, and so does ROUGE against the references. Run the command again to continue.
    """
    from turret.workspace import Workspace

    named = options.columns(prompt=prompt, completion=completion, messages=messages)
    recipe = read_recipe(source, base, name, data, task, None, None, seed, sets, named, device)
    names = [each.strip() for each in aspects.split(",") if each.strip()]
    with status() as show:
        found = Workspace(store).control(
            recipe, names, methods=methods, seeds=seeds, judge=judge, texts=texts, on_stage=on_training(show)
        )
    report(found, as_json, _print)


def _print(found: Control) -> None:
    from turret.compare.control_rates import headline

    out = console()
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
    kept = [version for each in found.rated for version in each.versions]
    if kept:
        out.print(
            f"[dim]The trainings are versions of this study. Keep one: turret promote {safe(kept[0])} production[/]"
        )
    out.print(f"[dim]report[/] {safe(found.folder)}/report.html")


def _rate(rate: Interval) -> str:
    return f"{rate.mean:.0f}% [dim]({rate.low:.0f} to {rate.high:.0f})[/]"
