"""Several trainings and one report: `turret compare`, `sweep` and `control`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from turret.amounts import many, size, span
from turret.cli import options
from turret.cli.output import columns, console, safe, status
from turret.errors import RecipeError, count_of
from turret.json_types import JsonObject

if TYPE_CHECKING:
    from turret.compare.comparison import Comparison, ComparisonRow
    from turret.compare.control_rates import Control
    from turret.compare.design import PlannedDesign
    from turret.compare.verdict import Interval
    from turret.workspace.sweeping import Sweep


# --- compare ----------------------------------------------------------------------------------------------------------


STYLES = {"within": "green", "better": "green", "worse": "red", "undecided": "yellow"}
WORDS = {"within": "as good"}
Texts = Annotated[bool, Option("--texts/--no-texts", help="Whether the report shows texts of the data.")]
Budget = Annotated[str | None, Option(help="Time for new trainings: 30m, 2h, 90s.")]
# The options of `compare` that say how something is trained.
OF_COMPARISONS = ("methods", "seeds", "budget", "fractions", "lr", "on", "plan")
OF_TRAININGS = (*OF_COMPARISONS, "base", "name", "data", "task", "seed", "text", "label")


def compare(
    *,
    context: typer.Context,
    source: options.Source,
    composition: Annotated[
        str | None, Option(metavar="REF+REF", help="Compare it with its parts on DATA; trains nothing.")
    ] = None,
    methods: Annotated[str | None, Option(help="Such as base,linear,full,lora:r=4/16.")] = None,
    seeds: Annotated[int, Option(help="Trainings per method.")] = 5,
    budget: Budget = None,
    fractions: Annotated[str, Option(help="Shares of the examples, such as 0.05,0.25,1.")] = "1",
    margin: Annotated[float, Option(help="Points by which a method may be worse.")] = 1.0,
    against: Annotated[str, Option(help="The baseline.")] = "full",
    lr: Annotated[str | None, Option(help="One rate for all methods, or auto.")] = None,
    texts: Texts = True,
    on: options.On = None,
    plan: Annotated[bool, Option(help="Show what this design can decide, without training.")] = False,
    training: Annotated[options.Training, options.Without(("method", "lr"))],
    command: options.Command,
) -> None:
    """Train several methods on the same data, and judge which is as good as the baseline.

    Every training is a version in the store, of the comparison: the plain name never means it. The last lines say how
    to keep one. Run the command again to continue with the missing trainings.
    With --composition, stored versions are compared instead: legal@production+formal@2, each of the two, and the base.
    """
    from turret.experiments.experiment import read_duration

    if composition is not None:
        given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
        if wrong := next((name for name in given if name in OF_TRAININGS), None):
            raise RecipeError(f"--composition compares stored versions and trains nothing: leave out --{wrong}")
        columns = options.Reading(training.columns, training.sets).keys()
        command.perform(
            _print_composition,
            command.workspace.compare_composition,
            composition,
            source,
            columns=columns,
            against=against if "against" in given else None,
            margin=margin,
            texts=texts,
            device=training.device or "auto",
        )
        return
    recipe = training.recipe(source)
    workspace, limit = command.workspace, None if budget is None else read_duration(budget, "--budget")
    shares = options.numbers("fractions", fractions, "numbers such as 0.05,0.25,1")
    rate = lr if lr in (None, "auto") else options.number("lr", lr, "a number or auto")
    design: JsonObject = {"methods": methods, "seeds": seeds, "fractions": shares, "lr": rate}
    design |= {"margin": margin, "against": against}
    if plan:
        command.perform(_print_plan, workspace.plan_comparison, recipe, **design)
        return
    with status() as show:
        found = workspace.compare(
            recipe,
            **design,
            budget=limit,
            texts=texts,
            on=on,
            on_stage=on_training(show),
            on_plan=lambda design: _print_plan(design, stderr=True),
        )
    command.report(found, _print)


def _print_plan(planned: PlannedDesign, *, stderr: bool = False) -> None:
    """The trainings, and which differences they can decide."""
    out = console(stderr=stderr)
    missing = f", {planned.missing} of them missing" if planned.missing < planned.trainings else ""
    out.print(f"[bold]{safe(planned.name)}[/]  [dim]{safe(', '.join(planned.methods))}[/]")
    out.print(f"  {count_of(planned.trainings, 'run')}{missing}, judged against {safe(planned.against)}")
    for sentence in planned.power.sentences():
        out.print(f"  {safe(sentence)}")


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
        out.print(f"\n[yellow]{count_of(found.missing, 'training')} missing[/]: the same command continues")
    promotion = found.promotion
    advice = f"turret promote {promotion.version} production" if promotion.version else "promote nothing yet"
    out.print(f"\n[bold]{safe(advice)}[/]  [dim]{safe(promotion.why)}[/]")
    kept = sum(len(row.versions) for row in found.rows)
    out.print(f"[dim]{_answering(safe(found.name), kept)}[/]")
    out.print(f"[dim]report[/] {safe(found.folder)}/report.html")


def _answering(name: str, trainings: int) -> str:
    """What the plain name answers after the comparison, and how to keep one of its versions."""
    return (
        f"{name} answers as before: the {count_of(trainings, 'training')} here are versions of the comparison. "
        f"Keep one: turret promote {name}@NUMBER production"
    )


def _print_composition(found: Comparison) -> None:
    from turret.compare.report import headline

    out = console()
    out.print(f"[bold]{safe(headline(found))}[/]\n")
    heads = ("row", found.metric, "difference", "verdict", "weights", "on disk", "forgot")
    rows = [
        (*_verdict_cells(row), many(own.trainable), size(own.bundle_bytes), own.forgot)
        for row in found.rows
        if (own := row.costs) is not None
    ]
    out.print(columns(heads, rows, right=heads[1:3] + heads[4:]))
    for row in found.rows:
        if row.verdict is not None and row.verdict.word == "undecided":
            out.print(f"  [dim]{safe(row.label)}: {safe(row.verdict.advice())}[/]")
    out.print(f"\n[dim]{safe(found.promotion.why)}[/]")
    out.print(f"[dim]report[/] {safe(found.folder)}/report.html")


def _verdict_cells(row: ComparisonRow) -> tuple[str, str, str, str]:
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
    name, *judged = _verdict_cells(row)
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


# --- sweep ------------------------------------------------------------------------------------------------------------


SHOWN = 10


def sweep(
    *,
    source: options.Source,
    sets: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUES", help="A range 1e-4..1e-2, a list 4,8,16, or a value; repeatable."),
    ] = None,
    trials: Annotated[
        int | None, Option(min=1, help="Trainings; default: all of the lists, or 20 with a range.")
    ] = None,
    budget: Budget = None,
    on: options.On = None,
    at_once: Annotated[int, Option(min=1, help="Trainings at a time, with --on.")] = 4,
    training: Annotated[options.Training, options.Without(("method", "lr", "sets"))],
    command: options.Command,
) -> None:
    """Search the best settings of a recipe. The validation split judges; the test split is never used.

    Lists are tried in all combinations, if --trials allows it. Otherwise Optuna proposes settings and ends trainings
    that fall behind (pip install 'turret[sweep]'). Run the command again to continue.
    The last line trains the best recipe.
    """
    from turret.experiments.experiment import read_duration

    recipe = training.recipe(source)
    with status() as show:
        found = command.workspace.sweep(
            recipe,
            options.overrides(sets),
            trials=trials,
            at_once=at_once,
            budget=None if budget is None else read_duration(budget, "--budget"),
            on=on,
            on_stage=on_training(show),
        )
    command.report(found, _print_sweep)
    command.offer(f"train {found.file}")


def _print_sweep(found: Sweep) -> None:
    out, ranked = console(), found.ranked
    keys = list(ranked[0].settings)
    rows = [
        (str(each.number + 1), *(_format_setting(each.settings[key]) for key in keys), f"{each.value:.4f}")
        for each in ranked[:SHOWN]
    ]
    heads = ("trial", *keys, f"{found.metric} (validation)")
    out.print(columns(heads, rows, right=("trial", heads[-1])))
    pruned = sum(each.state == "pruned" for each in found.trials)
    failed = sum(each.state == "failed" for each in found.trials)
    out.print(f"{len(ranked)} finished, {pruned} ended early, {failed} failed, {found.missing} missing")


def _format_setting(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else safe(str(value))


# --- control ----------------------------------------------------------------------------------------------------------


def control(
    *,
    source: options.Source,
    aspects: Annotated[str, Option(help="Names with commas; each replaces {aspect} in the data.")],
    methods: Annotated[str | None, Option(help="As in compare; default: base,prefix,lora.")] = None,
    seeds: Annotated[int, Option(help="Trainings per method and aspect.")] = 1,
    judge: Annotated[str | None, Option(help="Base of the classifier that judges outputs.")] = None,
    texts: Texts = True,
    training: Annotated[options.Training, options.Without(("text", "text_pair", "label", "method", "lr"))],
    command: options.Command,
) -> None:
    """Train an adapter for each aspect, and measure how often it writes about its aspect.

    A classifier judges the outputs, and so does ROUGE against the references. Run the command again to continue.
    """
    recipe = training.recipe(source)
    names = [each.strip() for each in aspects.split(",") if each.strip()]
    with status() as show:
        found = command.workspace.control(
            recipe, names, methods=methods, seeds=seeds, judge=judge, texts=texts, on_stage=on_training(show)
        )
    command.report(found, _print_control)


def _print_control(found: Control) -> None:
    from turret.compare.control_rates import headline

    out = console()
    out.print(f"[bold]{safe(headline(found))}[/]\n")
    heads = ("method", "by the classifier", "by ROUGE", "ROUGE-L, asked", "the others")
    rows = [
        (
            safe(each.label),
            _percent(each.by_classifier),
            _percent(each.by_rouge),
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


def _percent(rate: Interval) -> str:
    return f"{rate.mean:.0f}% [dim]({rate.low:.0f} to {rate.high:.0f})[/]"
