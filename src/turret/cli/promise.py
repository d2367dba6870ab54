"""`turret promise`: bound the errors of what a version decides, and say whether the bound holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from turret.cli import options
from turret.cli.output import console, emit, grid, safe, status
from turret.errors import counted
from turret.timestamp import to_minute

if TYPE_CHECKING:
    from turret.workspace import Workspace
    from turret.workspace.promising import PromiseStatus

HUES = {"holds so far": "green", "broken": "red", "cannot be known": "yellow"}


def promise(
    *,
    reference: options.Ref,
    error: Annotated[str | None, Option(metavar="SHARE", help="At most this share is wrong, such as 2%.")] = None,
    confidence: Annotated[str, Option(metavar="SHARE", help="How sure the bound is.")] = "95%",
    metric: Annotated[
        str, Option(help="What the share is of: error (the decided), misses:LABEL or precision:LABEL.")
    ] = "error",
    data: Annotated[
        str | None, Option(metavar="FILE", help="Labelled examples; default: those that training held out.")
    ] = None,
    reading: Annotated[options.Reading, options.Without(("prompt", "completion", "messages"))],
    when_broken: Annotated[
        Literal["alarm", "stricter", "rollback"], Option(help="What happens when outcomes break it.")
    ] = "alarm",
    outcome_ttl: Annotated[str, Option(help="Time after an answer in which its outcome counts: 12h, 7d.")] = "7d",
    missing_bound: Annotated[
        str, Option(help="Share of the answers whose missing outcome may depend on whether they are wrong.")
    ] = "5%",
    outcomes: Annotated[
        Path | None, Option(metavar="FILE", help="Record outcomes: a table with receipt and value.")
    ] = None,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Promise a bound on the errors of what a version decides, or show whether its promise holds.

    With --error, chooses the least probability with which the version decides, on examples that chose nothing. Answers
    below it abstain. Without --error, shows the promise and what the outcomes say.
    """
    from turret.experiments.experiment import read_duration, read_share

    workspace = command.workspace
    if outcomes is not None:
        _record(workspace, reference, outcomes, command.as_json)
        return
    if error is None:
        command.report(workspace.promise(reference), _print)
        return
    keys = reading.keys()
    with status() as say:
        made = workspace.promise(
            reference,
            read_share(error),
            confidence=read_share(confidence),
            metric=metric,
            data=data,
            columns=keys,
            when_broken=when_broken,
            outcome_ttl=read_duration(outcome_ttl),
            missing_bound=read_share(missing_bound),
            device=device,
            on_stage=say,
        )
    command.report(made, _print)
    command.offer(f"predict {reference} new.csv --out answered.csv", f"promise {reference}")


def _record(workspace: Workspace, reference: str, file: Path, as_json: bool) -> None:
    """Record the outcomes of a table, act if they break a promise, and show how the version's promise stands."""
    from turret.workspace.record_outcomes import lines_of, read

    workspace.promise(reference)  # raises NotFound before anything is recorded
    told = [(receipt or "", value) for receipt, _, value in read(file)]
    found = workspace.promise_outcomes(told)
    digest = workspace.resolve(reference).digest
    settled = next(each for each in workspace.settle_promises() if each.promise.digest == digest)
    if as_json:
        emit({"outcomes": [each.as_json() for each in found], **settled.as_json()})
        return
    for line in lines_of(found):
        console().print(safe(line))
    _print(settled)


def _print(found: PromiseStatus) -> None:
    from turret.workspace import promising

    promise, standing, out = found.promise, found.standing, console()
    out.print(f"[bold]{safe(found.version)}[/] promises {safe(promising.sentence(promise))}")
    rows = [("threshold", safe(promising.threshold(promise))), ("decides", safe(promising.cost(promise)))]
    if found.all_wrong is not None:
        rows.append(("without it", f"all are decided, and {found.all_wrong:.1%} were wrong"))
    rows.append(("chosen on", safe(promising.chosen_on(promise))))
    rows.append(("when broken", safe(promise.when_broken)))
    live = f"[{HUES[standing.state]}]{standing.state}[/]: {safe(standing.why)}"
    rows.append(("live", live))
    if found.answers:
        missing = f"{standing.missing:.0%} of the outcomes are missing"
        rows.append(("answers", f"{found.decided} of {counted(found.answers, 'answer')} decided; {missing}"))
        rows.append(("evidence", f"{standing.evidence:.3g} against it; {standing.needed:.3g} breaks it"))
    inputs = found.inputs
    hue = {"alike so far": "green", "drifted": "yellow"}.get(inputs.state, "dim")
    what = f"{inputs.state}: {inputs.why}" if inputs.state == "not watched" else inputs.why
    rows.append(("inputs", f"[{hue}]{safe(what)}[/]"))
    rows.append(("since", f"{safe(to_minute(promise.created))}{f' by {safe(promise.who)}' if promise.who else ''}"))
    out.print(grid(rows + [("note", safe(note)) for note in found.notes]))
    for line in found.done:
        out.print(f"[yellow]{safe(line)}[/]")
