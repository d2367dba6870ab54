"""`turret compare`: is it as good as full fine-tuning? Decode, call, encode."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from turret.cli import options
from turret.cli.output import columns, console, counted, emit, many, safe, size, span, status, voice
from turret.cli.train import Base, Data, Kind, Name, Seed, Source, read_recipe
from turret.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from turret.compare.design import PlannedDesign

STYLES = {"within": "green", "better": "green", "worse": "red", "undecided": "yellow"}
WORDS = {"within": "as good"}
Texts = Annotated[bool, typer.Option("--texts/--no-texts", help="Show examples in the report, or leave them out.")]
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def compare(
    source: Source,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Such as base,head,full,lora:r=4/16,prefix:num_virtual_tokens=10."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Trainings a method.")] = 5,
    budget: Annotated[str | None, typer.Option("--budget", help="Time for this sitting: 30m, 2h, 90s.")] = None,
    fractions: Annotated[str, typer.Option("--fractions", help="Learning curves: 0.05,0.25,1 of the examples.")] = "1",
    margin: Annotated[float, typer.Option("--margin", help="As good means: at most so many points worse.")] = 1.0,
    against: Annotated[str, typer.Option("--against", help="The method that all others are judged against.")] = "full",
    lr: Annotated[str | None, typer.Option("--lr", help="One rate for all, or auto; each its own if left out.")] = None,
    texts: Texts = True,
    plan: Annotated[bool, typer.Option("--plan", help="Say what this design can decide, and train nothing.")] = False,
    base: Base = None,
    name: Name = None,
    data: Data = None,
    task: Kind = None,
    seed: Seed = None,
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Train several methods on the same data, and say which is as good.

    Every training is a version in the store. The same command again goes on with what is missing.
    """
    from turret.workspace import Workspace

    recipe = read_recipe(source, base, name, data, task, None, None, seed, sets)
    workspace, out = Workspace(store), voice(as_json)
    limit, parts, rate = None if budget is None else duration(budget), shares(fractions), _rate(lr)
    with status() as live:
        if plan:
            planned = workspace.plan_comparison(
                recipe, methods=methods, seeds=seeds, fractions=parts, margin=margin, against=against, lr=rate,
                on_stage=live,
            )  # fmt: skip
        else:
            found = workspace.compare(
                recipe, methods=methods, seeds=seeds, budget=limit, fractions=parts, margin=margin, against=against,
                lr=rate, texts=texts, on_stage=say_titles(live),
                on_plan=lambda made: _print_plan(made, console(stderr=True)),
            )  # fmt: skip
    if plan:
        emit(planned.as_json()) if as_json else _print_plan(planned, out)
    else:
        emit(found.as_json()) if as_json else _print(found, out)


def _print_plan(planned: PlannedDesign, out: Console) -> None:
    """What is trained, which difference that can decide, and what would decide."""
    missing = f", {planned.missing} of them missing" if planned.missing < planned.trainings else ""
    out.print(f"[bold]{safe(planned.name)}[/]  [dim]{safe(', '.join(planned.methods))}[/]")
    out.print(f"  {counted(planned.trainings, 'run')}{missing}, judged against {safe(planned.against)}")
    for sentence in planned.power.sentences():
        out.print(f"  {safe(sentence)}")


def duration(text: str) -> float:
    """Seconds in `90`, `90s`, `30m`, `1.5h` or `1h30m`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if not parts or "".join(number + unit for number, unit in parts) != re.sub(r"\s", "", text.lower()):
        raise RecipeError(f"--budget {ascii(text)[1:40]}: expected a time such as 30m, 2h or 90s")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def shares(text: str) -> tuple[float, ...]:
    """`0.05,0.25,1` as numbers."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RecipeError(f"--fractions {ascii(text)[1:40]}: expected numbers such as 0.05,0.25,1") from None


def _rate(text: str | None) -> float | Literal["auto"] | None:
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"--lr {ascii(text)[1:40]}: expected a number or auto") from None


def say_titles(live: Any) -> Any:
    """A changing line where someone looks; else a line whenever another training begins."""
    err, told = console(stderr=True), [""]

    def say(words: str) -> None:
        live(words)
        title = words.split(": ")[0]
        if not err.is_terminal and title != told[0]:
            told[0] = title
            err.print(f"[dim]{safe(title)}[/]")

    return say


def _print(found: Any, out: Console) -> None:
    from turret.compare.report import headline

    out.print(f"[bold]{safe(headline(found))}[/]\n")
    heads = ("method", found.metric, "difference", "verdict", "trained", "memory", "training", "on disk")
    out.print(columns(heads, [_row(row) for row in found.rows], right=heads[1:3] + heads[4:]))
    for row in found.rows:
        if row.verdict is not None and row.verdict.word == "undecided" and row.kind != "base":
            out.print(f"  [dim]{safe(row.label)}: {safe(row.verdict.advice())}[/]")
        for mark in row.marks if row.kind != "base" else ():
            out.print(f"  [yellow]{safe(row.label)}: {safe(mark)}[/]")
        for each in row.collapses:
            out.print(f"    [yellow]{safe(each)}[/]")
        if row.failed:
            out.print(f"  [red]{safe(row.label)}[/] did not run: {safe(row.failed)}")
    if found.missing:
        out.print(f"\n[yellow]{counted(found.missing, 'training')} missing[/]: the same command goes on")
    said = found.promotion
    where = f"turret promote {said.version} production" if said.version else "promote nothing yet"
    out.print(f"\n[bold]{safe(where)}[/]  [dim]{safe(said.why)}[/]")
    out.print(f"[dim]report[/] {safe(found.folder)}/report.html")


def _row(row: Any) -> tuple[str, ...]:
    if row.score is None or row.costs is None:
        return (safe(row.label), "–", "–", "not run", "–", "–", "–", "–")
    verdict = row.verdict
    d = verdict.difference if verdict else None
    word = f"[{STYLES[verdict.word]}]{WORDS.get(verdict.word, verdict.word)}[/]" if verdict else "[dim]the baseline[/]"
    return (
        safe(row.label),
        f"{row.score.mean:.1f} [dim]({row.score.low:.1f} to {row.score.high:.1f})[/]",
        f"{d.mean:+.1f} [dim]({d.low:+.1f} to {d.high:+.1f})[/]" if d else "",
        word,
        many(row.costs.trainable) if row.costs.trainable else "–",
        size(row.costs.above_base.mean) if row.costs.above_base else "–",
        span(row.costs.train_seconds.mean) if row.costs.train_seconds else "–",
        size(row.costs.bundle_bytes) if row.costs.bundle_bytes else "–",
    )
