"""`turret experiment ...`: split live traffic between versions, and see which is better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.answers import data_columns
from turret.cli.output import columns, console, emit, grid, number, report, safe, status
from turret.json_types import JsonMapping
from turret.timestamp import to_minute

if TYPE_CHECKING:
    from turret.experiments.analyze import ArmAnalysis
    from turret.workspace.experimenting import ExperimentStatus

EVENTS = 8  # of the history, the newest ones
Name = Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)]
Number = Annotated[int | None, typer.Option("--number", help="Number of an earlier experiment.")]

app = typer.Typer(
    name="experiment",
    help="Split live traffic between versions, and see which is better.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def start(
    name: Name,
    candidate: Annotated[
        list[str] | None,
        typer.Option("--candidate", metavar="REF", help="A version that gets a share of the traffic; repeatable."),
    ] = None,
    control: Annotated[
        str | None, typer.Option("--control", metavar="REF", help="The version for the rest; default: the alias's.")
    ] = None,
    shadow: Annotated[
        list[str] | None,
        typer.Option("--shadow", metavar="REF", help="A version that runs but never answers; repeatable."),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option("--share", help="Share of the candidates, such as 50% or candidate=20%,candidate2=10%."),
    ] = None,
    ramp_: Annotated[
        str | None, typer.Option("--ramp", metavar="SHARES", help="Planned shares, such as 5%,20%,50%.")
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="binary, or the bounds of a number such as 1..5.")] = "binary",
    goal: Annotated[str, typer.Option("--goal", help="Which is better: higher or lower.")] = "higher",
    unit: Annotated[str, typer.Option("--unit", help="What counts once: user, session or request.")] = "user",
    alpha: Annotated[float, typer.Option("--alpha", help="Highest share of experiments with a false winner.")] = 0.05,
    outcome_ttl: Annotated[
        str,
        typer.Option("--outcome-ttl", help="Time after its first answer in which a unit's outcome counts: 12h, 7d."),
    ] = "7d",
    missing_bound: Annotated[
        str,
        typer.Option(
            "--missing-bound",
            help="A verdict must hold even if this share of an arm's units sent no outcome because it was bad.",
        ),
    ] = "5%",
    worse_by: Annotated[
        float, typer.Option("--worse-by", help="Roll back an arm that is worse by more than this margin.")
    ] = 0.0,
    keep_worse: Annotated[bool, typer.Option("--keep-worse", help="Never roll back because of outcomes.")] = False,
    max_errors: Annotated[
        float | None,
        typer.Option(
            "--max-errors", help="Roll back an arm with a share of errors above this and above the control's."
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            "--max-seconds",
            help="Roll back an arm if over 5% of its answers, and more than the control's, take longer.",
        ),
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Promote a better candidate automatically.")] = False,
    alias: Annotated[str, typer.Option("--alias", help="The alias whose traffic is split.")] = "production",
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Start an experiment on an adapter. By default the candidates get 5% of the traffic."""
    from turret.experiments import Guards
    from turret.experiments.experiment import read_duration, read_share, read_split
    from turret.workspace import Workspace

    guards = Guards(None if keep_worse else worse_by, max_errors, max_seconds, promote)
    experiment = Workspace(store).experiment(name)
    started = experiment.start(
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
        missing_bound=read_share(missing_bound),
        guards=guards,
        alias=alias,
    )
    report(started, as_json, _print)


@app.command()
def ramp(
    name: Name,
    share: Annotated[
        str | None, typer.Argument(help="Such as 20% or candidate=20%; default: the next planned share.")
    ] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Change the candidates' share of the traffic. As few units as possible change their arm."""
    from turret.experiments.experiment import read_split
    from turret.workspace import Workspace

    wanted = None if share is None else read_split(share)
    report(Workspace(store).experiment(name).ramp(wanted), as_json, _print)


@app.command()
def assign(
    name: Name,
    unit: Annotated[str, typer.Argument(help="The id of a user, session or request.", show_default=False)],
    receipt: Annotated[str | None, typer.Option("--receipt", help="Id of the answer, for its outcome.")] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Show which version answers a unit, and log it. A server does this automatically."""
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
    receipt: Annotated[str | None, typer.Option("--receipt", help="The receipt of the answer.")] = None,
    unit: Annotated[str | None, typer.Option("--unit", help="Or the unit that got the answer.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A table with value, and receipt or unit.")] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Record outcomes of answers, then do what the guards ask."""
    from turret.workspace import Workspace
    from turret.workspace.record_outcomes import tell

    recorded = tell(Workspace(store), name, value, receipt, unit, file)
    if as_json:
        emit(recorded.as_json())
        return
    for line in (*recorded.lines, *recorded.settled.done):
        console().print(safe(line))


@app.command("status")
def status_(
    name: Name, number: Number = None, store: options.Store = options.STORE, as_json: options.Json = False
) -> None:
    """Show the evidence and what to do next. You may look as often as you like."""
    from turret.workspace import Workspace

    report(Workspace(store).experiment(name, number).status(), as_json, _print)


@app.command()
def settle(name: Name, store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """Do what the guards ask: roll back or promote."""
    from turret.workspace import Workspace

    report(Workspace(store).experiment(name).settle(), as_json, _print)


@app.command()
def stop(
    name: Name,
    promote: Annotated[
        str | None, typer.Option("--promote", metavar="ARM", help="Give the alias to this arm, if it passes the gates.")
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Give the alias to the control.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """End an experiment, and move its alias in the same step."""
    from turret.workspace import Workspace

    with status() as say:
        ended = Workspace(store).experiment(name).stop(promote=promote, rollback=rollback, on_stage=say)
    report(ended, as_json, _print)


@app.command()
def replay(
    a: Annotated[str, typer.Argument(metavar="A", help="A version such as news@1.")],
    b: Annotated[str, typer.Argument(metavar="B", help="A version such as news@2.")],
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Labelled examples; default: A's golden examples.")
    ] = None,
    text: options.Text = None,
    text_pair: options.TextPair = None,
    label: options.Label = None,
    prompt: options.Prompt = None,
    completion: options.Completion = None,
    messages: options.Messages = None,
    sets: options.Set = None,
    device: options.Device = "auto",
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Compare two versions on labelled examples, without live traffic."""
    from turret.workspace import Workspace

    named = data_columns(sets, options.columns(text, text_pair, label, prompt, completion, messages))
    with status() as say:
        found = Workspace(store).replay(a, b, data, columns=named, device=device, on_stage=say)
    if as_json:
        emit(found.as_json())
        return
    console().print("\n".join(safe(line) for line in found.text.splitlines()))
    for note in found.notes:
        console().print(f"[dim]{safe(note)}[/]")


@app.command("list")
def list_(
    alpha: Annotated[float, typer.Option("--alpha", help="Highest share of false discoveries.")] = 0.05,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """List experiments, and which of them are discoveries."""
    from turret.workspace import Workspace

    found = Workspace(store).experiments(alpha=alpha)
    if as_json:
        emit({"alpha": alpha, "experiments": found})
    else:
        _print_list(found, alpha)


def _print(found: ExperimentStatus) -> None:
    from turret.experiments import status_text

    experiment = found.experiment
    ended = f", [yellow]ended[/] {safe(to_minute(experiment.ended))}" if experiment.ended else ", [green]running[/]"
    console().print(f"[bold]{safe(experiment)}[/] since {safe(to_minute(experiment.created))}{ended}")
    goal, unit = experiment.metric.goal, experiment.unit
    facts = [
        ("metric", f"{experiment.metric}, {goal} is better; each {unit} counts once; level {experiment.alpha:g}"),
        ("outcomes", status_text.lives(experiment)),
        ("missing", status_text.bears(experiment)),
        ("traffic", status_text.traffic(experiment)),
        ("guards", status_text.guards(experiment)),
        ("alias", f"{experiment.alias} names {found.points or 'nothing'}"),
    ]
    console().print(grid((name, safe(fact)) for name, fact in facts))
    right = ("share", "units", "outcomes", "missing", "mean", "answers", "errors", "s")
    heads = ("arm", "version", *right[:5], "against control", "evidence", *right[5:])
    console().print("\n", columns(heads, (_row(each) for each in found.analysis.arms), right=right), "\n", sep="")
    for line in (*found.done, *found.verdicts):
        console().print(safe(line))
    console().print(f"[bold]next:[/] {safe(found.next)}")
    for each in found.analysis.history[-EVENTS:]:
        by = f" by {each['who']}" if each["who"] else ""
        what = status_text.event(each["verb"], each["detail"])
        console().print(f"  [dim]{safe(to_minute(each['at']))}{safe(by)}  {safe(what)}[/]")


def _row(each: ArmAnalysis) -> tuple[str, ...]:
    answering, against = each.answering, each.against
    name = each.arm.name if each.arm.live else f"{each.arm.name} (rolled back)"
    compared, evidence = "", ""
    if against is not None and against.difference is not None:
        low, high = against.interval or (None, None)
        around = f" [{low:+.3f}, {high:+.3f}] approx." if low is not None and high is not None else ""
        compared = f"{against.difference:+.3f}{around}"
    if against is not None:
        evidence = f"better {against.better:.2g}, worse {against.worse:.2g} of {against.needed:.3g}"
    if each.arm.role == "shadow" and answering.compared:
        compared = f"agrees on {answering.agreed} of {answering.compared}"
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
        str(answering.answers),
        str(answering.errors),
        f"{answering.seconds / answering.answers:.2f}" if answering.answers else "",
    )


def _print_list(found: Sequence[JsonMapping], alpha: float) -> None:
    if not found:
        console().print("no experiments yet: [bold]turret experiment start NAME --candidate REF[/] starts one")
        return
    rows = []
    for each in found:
        arms = ", ".join(f"{arm} {version}" for arm, version in each["arms"].items())
        verdicts = ", ".join(f"{arm} {verdict}" for arm, verdict in each["verdicts"].items())
        named = "[green]discovery[/]" if each["discovery"] else ""
        head = f"[bold]{safe(each['experiment'])}[/]"
        rows.append((head, safe(each["state"]), safe(arms), str(each["outcomes"]), safe(verdicts), named))
    console().print(columns(("experiment", "state", "arms", "outcomes", "verdict", ""), rows, right=("outcomes",)))
    console().print(f"[dim]at most {100 * alpha:g}% of the discoveries are false, over all experiments (e-BH)[/]")
