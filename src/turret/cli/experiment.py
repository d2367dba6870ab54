"""`turret experiment ...`: split live traffic between versions, and see which is better."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from turret.cli import options
from turret.cli.output import columns, console, grid, number, safe
from turret.errors import BadExperiment
from turret.timestamp import to_minute

if TYPE_CHECKING:
    from turret.experiments.analyze import ArmAnalysis
    from turret.json_types import JsonObject
    from turret.workspace.evaluation import Replayed
    from turret.workspace.experimenting import ExperimentStatus

EVENTS = 8  # of the history, the newest ones
Name = Annotated[str, Argument(help="Name of the adapter.", show_default=False)]
Number = Annotated[int | None, Option(help="Number of an earlier experiment.")]


def start(
    *,
    name: Name,
    candidate: Annotated[
        list[str] | None, Option(metavar="REF", help="A version that gets a share of the traffic; repeatable.")
    ] = None,
    control: Annotated[
        str | None, Option(metavar="REF", help="The version for the rest; default: the alias's.")
    ] = None,
    shadow: Annotated[
        list[str] | None, Option(metavar="REF", help="A version that runs but never answers; repeatable.")
    ] = None,
    share: Annotated[
        str | None, Option(help="Share of the candidates, such as 50% or candidate=20%,candidate2=10%.")
    ] = None,
    ramp_: Annotated[str | None, Option("--ramp", metavar="SHARES", help="Planned shares, such as 5%,20%,50%.")] = None,
    metric: Annotated[str, Option(help="binary, or the bounds of a number such as 1..5.")] = "binary",
    goal: Annotated[str, Option(help="Which is better: higher or lower.")] = "higher",
    unit: Annotated[str, Option(help="What counts once: user, session or request.")] = "user",
    alpha: Annotated[float, Option(help="Highest share of experiments with a false winner.")] = 0.05,
    outcome_ttl: Annotated[
        str, Option(help="Time after its first answer in which a unit's outcome counts: 12h, 7d.")
    ] = "7d",
    missing_bound: Annotated[
        str, Option(help="A verdict must hold even if this share of an arm's units sent no outcome because it was bad.")
    ] = "5%",
    worse_by: Annotated[float, Option(help="Roll back an arm that is worse by more than this margin.")] = 0.0,
    keep_worse: Annotated[bool, Option(help="Never roll back because of outcomes.")] = False,
    max_errors: Annotated[
        float | None, Option(help="Roll back an arm with a share of errors above this and above the control's.")
    ] = None,
    max_seconds: Annotated[
        float | None,
        Option(help="Roll back an arm if over 5% of its answers, and more than the control's, take longer."),
    ] = None,
    promote: Annotated[bool, Option(help="Promote a better candidate automatically.")] = False,
    alias: Annotated[str, Option(help="The alias whose traffic is split.")] = "production",
    command: options.Command,
) -> None:
    """Start an experiment on an adapter. By default the candidates get 5% of the traffic."""
    from turret.experiments import Guards
    from turret.experiments.experiment import read_duration, read_share, read_split

    guards = Guards(None if keep_worse else worse_by, max_errors, max_seconds, promote)
    experiment = command.workspace.experiment(name)
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
    command.report(started, _print)


def ramp(
    *,
    name: Name,
    share: Annotated[
        str | None, Argument(help="Such as 20% or candidate=20%; default: the next planned share.")
    ] = None,
    command: options.Command,
) -> None:
    """Change the candidates' share of the traffic. As few units as possible change their arm."""
    from turret.experiments.experiment import read_split

    wanted = None if share is None else read_split(share)
    command.report(command.workspace.experiment(name).ramp(wanted), _print)


def assign(
    *,
    name: Name,
    unit: Annotated[str, Argument(help="The id of a user, session or request.", show_default=False)],
    receipt: Annotated[str | None, Option(help="Id of the answer, for its outcome.")] = None,
    command: options.Command,
) -> None:
    """Show which version answers a unit, and log it. A server does this automatically."""
    version, arm, chance = command.workspace.experiment(name).assign(unit, receipt)
    line = f"[bold]{safe(version)}[/] [dim]({arm}, probability {chance:.3g})[/]"
    command.say({"version": version, "arm": arm, "probability": chance}, line)


def outcome(
    *,
    name: Name,
    value: Annotated[str | None, Argument(help="0 or 1, or a number.", show_default=False)] = None,
    receipt: Annotated[str | None, Option(help="The receipt of the answer.")] = None,
    unit: Annotated[str | None, Option(help="Or the unit that got the answer.")] = None,
    file: Annotated[Path | None, Option(help="A table with value, and receipt or unit.")] = None,
    command: options.Command,
) -> None:
    """Record outcomes of answers, then do what the guards ask."""
    from turret.experiments.outcomes import count_by_status
    from turret.workspace.experimenting import lines_of, read_outcomes

    if (file is None) == (value is None) or (file is not None and (receipt or unit)):
        raise BadExperiment(
            "outcome: give one value with --receipt or --unit, or a table of many with --file, and not both"
        )
    experiment = command.workspace.experiment(name)
    if file is None:
        recorded = [experiment.outcome(value, receipt=receipt, unit=unit)]
    else:
        recorded = experiment.outcomes(read_outcomes(file))
    counts, done = dict(count_by_status(recorded)), experiment.settle().done
    said = {"outcomes": [each.as_json() for each in recorded], "counts": counts, "done": list(done)}
    command.say(said, "\n".join(safe(line) for line in (*lines_of(recorded), *done)))


def status_(*, name: Name, number: Number = None, command: options.Command) -> None:
    """Show the evidence and what to do next. You may look as often as you like."""
    command.report(command.workspace.experiment(name, number).status(), _print)


def settle(name: Name, command: options.Command) -> None:
    """Do what the guards ask: roll back or promote."""
    command.report(command.workspace.experiment(name).settle(), _print)


def stop(
    *,
    name: Name,
    promote: Annotated[
        str | None, Option(metavar="ARM", help="Give the alias to this arm, if it passes the gates.")
    ] = None,
    rollback: Annotated[bool, Option(help="Give the alias to the control.")] = False,
    command: options.Command,
) -> None:
    """End an experiment, and move its alias in the same step."""
    command.perform(_print, command.workspace.experiment(name).stop, promote=promote, rollback=rollback)


def replay(
    *,
    a: Annotated[str, Argument(metavar="A", help="A version such as news@1.")],
    b: Annotated[str, Argument(metavar="B", help="A version such as news@2.")],
    data: Annotated[
        str | None, Argument(metavar="DATA", help="Labelled examples; default: A's golden examples.")
    ] = None,
    reading: options.Reading,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Compare two versions on labelled examples, without live traffic."""
    keys = reading.keys()
    command.perform(_print_replayed, command.workspace.replay, a, b, data, columns=keys, device=device)


def list_(
    *,
    alpha: Annotated[float, Option(help="Highest share of false discoveries.")] = 0.05,
    command: options.Command,
) -> None:
    """List experiments, and which of them are discoveries."""
    found = command.workspace.experiments(alpha=alpha)
    command.table(
        {"alpha": alpha, "experiments": found},
        ("experiment", "state", "arms", "outcomes", "verdict", ""),
        map(_experiment_row, found),
        right=("outcomes",),
        none="no experiments yet: [bold]turret experiment start NAME --candidate REF[/] starts one",
    )
    if found and not command.as_json:
        console().print(f"[dim]at most {100 * alpha:g}% of the discoveries are false, over all experiments (e-BH)[/]")


app = options.group(
    "Split live traffic between versions, and see which is better.",
    start,
    ramp,
    assign,
    outcome,
    status_,
    settle,
    stop,
    replay,
    list_,
)


def _print(found: ExperimentStatus) -> None:
    from turret.experiments import status_text

    experiment = found.experiment
    ended = f", [yellow]ended[/] {safe(to_minute(experiment.ended))}" if experiment.ended else ", [green]running[/]"
    console().print(f"[bold]{safe(experiment)}[/] since {safe(to_minute(experiment.created))}{ended}")
    goal, unit = experiment.metric.goal, experiment.unit
    facts = [
        ("metric", f"{experiment.metric}, {goal} is better; each {unit} counts once; level {experiment.alpha:g}"),
        ("outcomes", status_text.outcome_lifetime(experiment)),
        ("missing", status_text.missing_outcomes_text(experiment)),
        ("traffic", status_text.traffic_split(experiment)),
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


def _print_replayed(found: Replayed) -> None:
    console().print("\n".join(safe(line) for line in found.text.splitlines()))
    for note in found.notes:
        console().print(f"[dim]{safe(note)}[/]")


def _row(each: ArmAnalysis) -> tuple[str, ...]:
    answering, against = each.answering, each.against
    name = each.arm.name if each.arm.live else f"{each.arm.name} (rolled back)"
    compared, evidence = "", ""
    if against is not None and against.difference is not None:
        low, high = against.interval or (None, None)
        around = f" [{low:+.3f}, {high:+.3f}]" if low is not None and high is not None else ""
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


def _experiment_row(found: JsonObject) -> tuple[str, ...]:
    return (
        f"[bold]{safe(found['experiment'])}[/]",
        safe(found["state"]),
        safe(", ".join(f"{arm} {version}" for arm, version in found["arms"].items())),
        str(found["outcomes"]),
        safe(", ".join(f"{arm} {verdict}" for arm, verdict in found["verdicts"].items())),
        "[green]discovery[/]" if found["discovery"] else "",
    )
