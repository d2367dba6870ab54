"""`turret compare`: compare methods with full fine-tuning, or a composition of stored versions with its parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from turret.cli import options
from turret.cli.answers import data_columns
from turret.cli.output import columns, console, many, report, safe, size, span, status
from turret.cli.train import Base, Data, Kind, Name, Seed, Source, read_recipe
from turret.errors import RecipeError, counted

if TYPE_CHECKING:
    from turret.compare.comparison import Comparison
    from turret.compare.design import PlannedDesign
    from turret.compare.rows import ComparisonRow

STYLES = {"within": "green", "better": "green", "worse": "red", "undecided": "yellow"}
WORDS = {"within": "as good"}
Texts = Annotated[bool, typer.Option("--texts/--no-texts", help="Whether the report shows texts of the data.")]
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
OF_TRAININGS = (  # options that say how something is trained
    "methods",
    "seeds",
    "budget",
    "fractions",
    "lr",
    "on",
    "plan",
    "base",
    "name",
    "data",
    "task",
    "seed",
    "text",
    "label",
)


def compare(
    context: typer.Context,
    source: Source,
    composition: Annotated[
        str | None,
        typer.Option("--composition", metavar="REF+REF", help="Compare it with its parts on DATA; trains nothing."),
    ] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Such as base,linear,full,lora:r=4/16.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Trainings per method.")] = 5,
    budget: Annotated[str | None, typer.Option("--budget", help="Time for new trainings: 30m, 2h, 90s.")] = None,
    fractions: Annotated[str, typer.Option("--fractions", help="Shares of the examples, such as 0.05,0.25,1.")] = "1",
    margin: Annotated[float, typer.Option("--margin", help="Points by which a method may be worse.")] = 1.0,
    against: Annotated[str, typer.Option("--against", help="The baseline.")] = "full",
    lr: Annotated[str | None, typer.Option("--lr", help="One rate for all methods, or auto.")] = None,
    texts: Texts = True,
    on: options.On = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what this design can decide, without training.")] = False,
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
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Train several methods on the same data, and judge which is as good as the baseline.

    Every training is a version in the store, of the comparison: the plain name never means it. The last lines say how
    to keep one. Run the command again to continue with the missing trainings.
    With --composition, stored versions are compared instead: legal@production+formal@2, each of the two, and the base.
    """
    from turret.workspace import Workspace

    if composition is not None:
        given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
        if wrong := next((name for name in given if name in OF_TRAININGS), None):
            raise RecipeError(f"--composition compares stored versions and trains nothing: leave out --{wrong}")
        columns = data_columns(sets, options.columns(prompt=prompt, completion=completion, messages=messages))
        with status() as show:
            found = Workspace(store).compare_composition(
                composition,
                source,
                columns=columns,
                against=against if "against" in given else None,
                margin=margin,
                texts=texts,
                device=device or "auto",
                on_stage=show,
            )
        report(found, as_json, _print_composition)
        return
    named = options.columns(text, text_pair, label, prompt, completion, messages)
    recipe = read_recipe(source, base, name, data, task, None, None, seed, sets, named, device)
    workspace = Workspace(store)
    limit, parts, rate = None if budget is None else duration(budget), shares(fractions), _rate(lr)
    with status() as show:
        if plan:
            planned = workspace.plan_comparison(
                recipe,
                methods=methods,
                seeds=seeds,
                fractions=parts,
                margin=margin,
                against=against,
                lr=rate,
                on_stage=show,
            )
        else:
            found = workspace.compare(
                recipe,
                methods=methods,
                seeds=seeds,
                budget=limit,
                fractions=parts,
                margin=margin,
                against=against,
                lr=rate,
                texts=texts,
                on=on,
                on_stage=on_training(show),
                on_plan=lambda design: _print_plan(design, stderr=True),
            )
    if plan:
        report(planned, as_json, _print_plan)
    else:
        report(found, as_json, _print)


def _print_plan(planned: PlannedDesign, *, stderr: bool = False) -> None:
    """The trainings, and which differences they can decide."""
    out = console(stderr=stderr)
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
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"--lr {ascii(text)[1:40]}: expected a number or auto") from None


def on_training(show: Callable[[str], None]) -> Callable[[str], None]:
    """Shows the current stage on a terminal; if stderr is no terminal, prints a line for each training instead."""
    err, last = console(stderr=True), ""

    def on_stage(text: str) -> None:
        nonlocal last
        show(text)
        title = text.split(": ")[0]
        if not err.is_terminal and title != last:
            last = title
            err.print(f"[dim]{safe(title)}[/]")

    return on_stage


def _print(found: Comparison) -> None:
    from turret.compare.report import headline

    out = console()
    out.print(f"[bold]{safe(headline(found))}[/]\n")
    forgot = any(row.costs is not None and row.costs.forgetting is not None for row in found.rows)
    heads: tuple[str, ...] = (
        "method",
        "steps",
        found.metric,
        "difference",
        "verdict",
        "trained",
        "memory",
        "training",
        "on disk",
    )
    heads += ("forgot",) if forgot else ()  # of generators only
    out.print(columns(heads, [_row(row)[: len(heads)] for row in found.rows], right=heads[1:4] + heads[5:]))
    for said in found.said:
        out.print(f"  [dim]{safe(said)}[/]")
    for row in found.rows:
        if row.at_equal_steps is not None:
            out.print(f"  [dim]{safe(row.label)}: {safe(found.at_equal_steps(row))}[/]")
        if row.verdict is not None and row.verdict.word == "undecided" and row.kind != "base":
            out.print(f"  [dim]{safe(row.label)}: {safe(row.verdict.advice())}[/]")
        for mark in row.marks if row.kind != "base" else ():
            out.print(f"  [yellow]{safe(row.label)}: {safe(mark)}[/]")
        for each in row.collapses:
            out.print(f"    [yellow]{safe(each)}[/]")
        if row.failed:
            out.print(f"  [red]{safe(row.label)}[/] did not run: {safe(row.failed)}")
    if found.missing:
        out.print(f"\n[yellow]{counted(found.missing, 'training')} missing[/]: the same command continues")
    promotion = found.promotion
    advice = f"turret promote {promotion.version} production" if promotion.version else "promote nothing yet"
    out.print(f"\n[bold]{safe(advice)}[/]  [dim]{safe(promotion.why)}[/]")
    kept = sum(len(row.versions) for row in found.rows)
    out.print(f"[dim]{_answering(safe(found.name), kept)}[/]")
    out.print(f"[dim]report[/] {safe(found.folder)}/report.html")


def _answering(name: str, trainings: int) -> str:
    """What the plain name answers after the comparison, and how to keep one of its versions."""
    return (
        f"{name} answers as before: the {counted(trainings, 'training')} here are versions of the comparison. "
        f"Keep one: turret promote {name}@NUMBER production"
    )


def _print_composition(found: Comparison) -> None:
    from turret.compare.report import headline

    out = console()
    out.print(f"[bold]{safe(headline(found))}[/]\n")
    heads = ("row", found.metric, "difference", "verdict", "weights", "on disk", "forgot")
    rows = [
        (*_judged(row), many(own.trainable), size(own.bundle_bytes), own.forgot)
        for row in found.rows
        if (own := row.costs) is not None
    ]
    out.print(columns(heads, rows, right=heads[1:3] + heads[4:]))
    for row in found.rows:
        if row.verdict is not None and row.verdict.word == "undecided":
            out.print(f"  [dim]{safe(row.label)}: {safe(row.verdict.advice())}[/]")
    out.print(f"\n[dim]{safe(found.promotion.why)}[/]")
    out.print(f"[dim]report[/] {safe(found.folder)}/report.html")


def _judged(row: ComparisonRow) -> tuple[str, str, str, str]:
    """The name, score, difference and verdict of a row."""
    if row.score is None:
        return safe(row.label), "–", "–", "not run"
    verdict = row.verdict
    d = verdict.difference if verdict else None
    return (
        safe(row.label),
        f"{row.score.mean:.1f} [dim]({row.score.low:.1f} to {row.score.high:.1f})[/]",
        f"{d.mean:+.1f} [dim]({d.low:+.1f} to {d.high:+.1f})[/]" if d else "",
        f"[{STYLES[verdict.word]}]{WORDS.get(verdict.word, verdict.word)}[/]" if verdict else "[dim]baseline[/]",
    )


def _row(row: ComparisonRow) -> tuple[str, ...]:
    name, *judged = _judged(row)
    if row.costs is None:
        return (name, "–", *judged, "–", "–", "–", "–", "–")
    return (
        name,
        str(row.steps or "–"),
        *judged,
        many(row.costs.trainable) if row.costs.trainable else "–",
        size(row.costs.above_base.mean) if row.costs.above_base else "–",
        span(row.costs.train_seconds.mean) if row.costs.train_seconds else "–",
        size(row.costs.bundle_bytes) if row.costs.bundle_bytes else "–",
        row.costs.forgot,
    )
