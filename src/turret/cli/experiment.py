"""`turret experiment ...`: traffic split between versions, and what came of it. Decode, call, encode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turret.cli import options
from turret.cli.answers import data_columns
from turret.cli.output import columns, console, emit, grid, number, safe, status

if TYPE_CHECKING:
    from turret.experiments.analyze import ArmAnalysis
    from turret.workspace.experimenting import ExperimentStatus

MOVES = 8  # of the history, for people
Name = Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)]
Number = Annotated[int | None, typer.Option("--number", help="An earlier experiment of the name.")]

app = typer.Typer(
    name="experiment",
    help="Split live traffic between versions, and know which is better.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def start(
    name: Name,
    candidate: Annotated[
        list[str] | None, typer.Option("--candidate", metavar="REF", help="Gets a share of the traffic; repeatable.")
    ] = None,
    control: Annotated[
        str | None, typer.Option("--control", metavar="REF", help="Gets the rest; what the alias names, unless given.")
    ] = None,
    shadow: Annotated[
        list[str] | None, typer.Option("--shadow", metavar="REF", help="Runs beside, never answers; repeatable.")
    ] = None,
    share: Annotated[
        str | None, typer.Option("--share", help="Of the candidates, such as 50% or candidate=20%,candidate2=10%.")
    ] = None,
    ramp_: Annotated[
        str | None, typer.Option("--ramp", metavar="SHARES", help="Planned shares, begun with the first.")
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="binary, or bounds such as 1..5.")] = "binary",
    goal: Annotated[str, typer.Option("--goal", help="higher or lower is better.")] = "higher",
    unit: Annotated[str, typer.Option("--unit", help="What is assigned and counts once: user, session, request.")] = (
        "user"
    ),
    alpha: Annotated[float, typer.Option("--alpha", help="Share of experiments that may name a false winner.")] = 0.05,
    outcome_ttl: Annotated[
        str,
        typer.Option("--outcome-ttl", help="How long after its first answer the outcome of a unit counts: 12h, 7d."),
    ] = "7d",
    worse_by: Annotated[
        float, typer.Option("--worse-by", help="Roll back what is worse by more than this margin.")
    ] = 0.0,
    keep_worse: Annotated[bool, typer.Option("--keep-worse", help="Never roll back for outcomes.")] = False,
    max_errors: Annotated[
        float | None, typer.Option("--max-errors", help="Roll back beyond this share of errors, and beyond control's.")
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option("--max-seconds", help="Roll back when over 5% of answers take longer, and more than of control."),
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="A better candidate takes the alias by itself.")] = False,
    alias: Annotated[str, typer.Option("--alias", help="The alias that is at stake.")] = "production",
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Begin an experiment on a name: 5% to the candidate, unless said otherwise."""
    from turret.experiments import Guards
    from turret.experiments.experiment import read_duration, read_share, read_split
    from turret.workspace import Workspace

    guards = Guards(None if keep_worse else worse_by, max_errors, max_seconds, promote)
    begun = (
        Workspace(store)
        .experiment(name)
        .start(
            candidate or (),
            control=control,
            shadows=shadow or (),
            share=None if share is None else read_split(share),
            steps=None if ramp_ is None else [read_share(step) for step in ramp_.split(",")],
            metric=metric,
            goal=goal,
            unit=unit,
            alpha=alpha,
            outcome_ttl=read_duration(outcome_ttl),
            guards=guards,
            alias=alias,
        )
    )
    _answer(begun, as_json)


@app.command()
def ramp(
    name: Name,
    share: Annotated[
        str | None, typer.Argument(help="Such as 20%, or candidate=20%; the next planned one unless given.")
    ] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Send another share of the traffic to the candidates; no more units move than must."""
    from turret.experiments.experiment import read_split
    from turret.workspace import Workspace

    wanted = None if share is None else read_split(share)
    _answer(Workspace(store).experiment(name).ramp(wanted), as_json)


@app.command()
def assign(
    name: Name,
    unit: Annotated[str, typer.Argument(help="A user's, session's or request's id.", show_default=False)],
    receipt: Annotated[str | None, typer.Option("--receipt", help="Id of the answer, for its outcome.")] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Say which version answers a unit, and log it; a server does this by itself."""
    from turret.workspace import Workspace

    version, arm, chance = Workspace(store).experiment(name).assign(unit, receipt)
    if as_json:
        emit({"version": version, "arm": arm, "probability": chance})
    else:
        console().print(f"[bold]{safe(version)}[/] [dim]({arm}, probability {chance:.3g})[/]")


@app.command()
def outcome(
    name: Name,
    value: Annotated[str | None, typer.Argument(help="0 or 1, or a number.", show_default=False)] = None,
    receipt: Annotated[str | None, typer.Option("--receipt", help="The answer that it is of.")] = None,
    unit: Annotated[str | None, typer.Option("--unit", help="Or the unit that was answered.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Many: a table with value and receipt or unit.")] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Tell what came of answers, then do what the guards ask."""
    from turret.workspace import Workspace
    from turret.workspace.record_outcomes import tell

    told = tell(Workspace(store), name, value, receipt, unit, file)
    if as_json:
        emit(told.as_json())
        return
    for line in (*told.lines, *told.settled.done):
        console().print(safe(line))


@app.command("status")
def status_(
    name: Name, number: Number = None, store: options.Store = options.STORE, as_json: options.Json = False
) -> None:
    """Show what is known and what to do; looking does no harm, however often."""
    from turret.workspace import Workspace

    _answer(Workspace(store).experiment(name, number).status(), as_json)


@app.command()
def settle(name: Name, store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """Do what the guards ask: roll back or promote."""
    from turret.workspace import Workspace

    _answer(Workspace(store).experiment(name).settle(), as_json)


@app.command()
def stop(
    name: Name,
    promote: Annotated[
        str | None, typer.Option("--promote", metavar="ARM", help="Give this arm the alias, past its gates.")
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Give the control the alias.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """End an experiment, in one go with what becomes of the alias."""
    from turret.workspace import Workspace

    with status() as say:
        ended = Workspace(store).experiment(name).stop(promote=promote, rollback=rollback, on_stage=say)
    _answer(ended, as_json)


@app.command()
def replay(
    a: Annotated[str, typer.Argument(metavar="A", help="Such as news@1.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Such as news@2.")],
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Labelled examples; else the golden examples.")
    ] = None,
    sets: options.Set = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Compare two versions on stored examples, before live traffic is spent."""
    from turret.workspace import Workspace

    with status() as say:
        found = Workspace(store).replay(a, b, data, columns=data_columns(sets), on_stage=say)
    if as_json:
        emit(found.as_json())
        return
    console().print("\n".join(safe(line) for line in found.text.splitlines()))
    for note in found.notes:
        console().print(f"[dim]{safe(note)}[/]")


@app.command("list")
def list_(
    alpha: Annotated[float, typer.Option("--alpha", help="Share of the discoveries that may be false.")] = 0.05,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """List experiments, and which of them found something."""
    from turret.workspace import Workspace

    found = Workspace(store).experiments(alpha=alpha)
    if as_json:
        emit({"alpha": alpha, "experiments": found})
    else:
        _print_list(found, alpha)


def _answer(found: ExperimentStatus, as_json: bool) -> None:
    if as_json:
        emit(found.as_json())
    else:
        _print(found)


def _print(found: ExperimentStatus) -> None:
    from turret.experiments import status_text

    experiment = found.experiment
    ended = f", [yellow]ended[/] {safe(_time(experiment.ended))}" if experiment.ended else ", [green]running[/]"
    console().print(f"[bold]{safe(experiment)}[/] since {safe(_time(experiment.created))}{ended}")
    better = "more" if experiment.metric.goal == "higher" else "less"
    facts = [
        (
            "metric",
            f"{experiment.metric}, {better} is better; a {experiment.unit} counts once; level {experiment.alpha:g}",
        ),
        ("outcomes", status_text.lives(experiment)),
        ("traffic", status_text.traffic(experiment)),
        ("guards", status_text.guards(experiment)),
        ("alias", f"{experiment.alias} names {found.points or 'nothing'}"),
    ]
    console().print(grid((name, safe(fact)) for name, fact in facts))
    heads = (
        "arm",
        "version",
        "share",
        "units",
        "outcomes",
        "missing",
        "mean",
        "against control",
        "evidence",
        "answers",
        "errors",
        "s",
    )
    right = ("share", "units", "outcomes", "missing", "mean", "answers", "errors", "s")
    console().print("\n", columns(heads, (_row(each) for each in found.weighed.arms), right=right), "\n", sep="")
    for line in (*found.done, *found.verdicts):
        console().print(safe(line))
    console().print(f"[bold]next:[/] {safe(found.next)}")
    for each in found.weighed.history[-MOVES:]:
        by = f" by {each['who']}" if each["who"] else ""
        console().print(
            f"  [dim]{safe(_time(each['at']))}{safe(by)}  {safe(status_text.event(each['verb'], each['detail']))}[/]"
        )


def _row(each: ArmAnalysis) -> tuple[str, ...]:
    seen, against = each.answering, each.against
    name = each.arm.name if each.arm.live else f"{each.arm.name} (out)"
    compared, evidence = "", ""
    if against is not None and against.difference is not None:
        low, high = against.interval or (None, None)
        around = f" [{low:+.3f}, {high:+.3f}] approx." if low is not None and high is not None else ""
        compared = f"{against.difference:+.3f}{around}"
    if against is not None:
        evidence = f"better {against.better:.2g}, worse {against.worse:.2g} of {against.needed:.3g}"
    if each.arm.role == "shadow" and seen.compared:
        compared = f"agrees on {seen.agreed} of {seen.compared}"
    return (
        f"[bold]{safe(name)}[/]",
        safe(each.version),
        f"{100 * each.share:.3g}%" if each.arm.role != "shadow" else "",
        str(each.units),
        str(each.outcomes),
        str(each.missing),
        "" if each.mean is None else number(each.mean),
        safe(compared),
        safe(evidence),
        str(seen.answers),
        str(seen.errors),
        f"{seen.seconds / seen.answers:.2f}" if seen.answers else "",
    )


def _print_list(found: Sequence[Mapping[str, Any]], alpha: float) -> None:
    if not found:
        console().print("no experiments yet: [bold]turret experiment start NAME --candidate REF[/] begins one")
        return
    rows = []
    for each in found:
        arms = ", ".join(f"{arm} {version}" for arm, version in each["arms"].items())
        verdicts = ", ".join(f"{arm} {verdict}" for arm, verdict in each["verdicts"].items())
        named = "[green]discovery[/]" if each["discovery"] else ""
        head = f"[bold]{safe(each['experiment'])}[/]"
        rows.append((head, safe(each["state"]), safe(arms), str(each["outcomes"]), safe(verdicts), named))
    console().print(columns(("experiment", "state", "arms", "outcomes", "verdict", ""), rows, right=("outcomes",)))
    console().print(f"[dim]of the discoveries, at most {100 * alpha:g}% are false, over all experiments here (e-BH)[/]")


def _time(at: str) -> str:
    return f"{at[:16].replace('T', ' ')} UTC"
