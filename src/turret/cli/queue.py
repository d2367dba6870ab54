"""`turret runs` and `turret worker`: the trainings of a store, and the worker that takes them from its queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from turret.cli import options
from turret.cli.output import columns, console, emit, safe
from turret.errors import RecipeError

if TYPE_CHECKING:
    from turret.store.jobs import StudyRow
    from turret.store.runs import RunRow

EXIT_STATUS = {"finished": 0, "waiting": 75}  # of a worker that did one job, by the job's state
STYLES = {"finished": "green", "failed": "red", "running": "bold", "waiting": "yellow"}
HEADS = ("run", "adapter", "state", "priority", "tries", "created", "")
Most = Annotated[int, Option(min=1, help="How many, newest first.")]
Id = Annotated[str, Argument(metavar="ID", help="The id of a run.", show_default=False)]


def runs(*, context: typer.Context, most: Most = 20, command: options.Command) -> None:
    """List trainings: running, ended, and waiting in the queue."""
    if context.invoked_subcommand is None:
        list_(most=most, command=command)


def list_(*, most: Most = 20, command: options.Command) -> None:
    """List trainings: running, ended, and waiting in the queue."""
    found = command.workspace.runs(most)
    command.table(
        {"store": str(command.store), "runs": list(found)},
        HEADS,
        map(_row, found),
        right=("priority", "tries"),
        none="no run: turret train starts one, turret train --queue leaves it to a worker",
    )


def show(id: Id, command: options.Command) -> None:
    """Show one training, with the log of its worker."""
    workspace = command.workspace
    run = workspace.run(id)
    log = list(workspace.queue.log(id)) if run["queue"] is not None else []
    place = workspace.queue.place(id) if run["state"] == "waiting" else None
    if command.as_json:
        emit({**run, "log": log, "place": None if place is None else {"place": place[0], "of": place[1]}})
        return
    console().print(columns(HEADS, [_row(run)]))
    if place is not None:
        console().print(f"place {place[0]} of the {place[1]} that wait  [dim]turret worker takes them[/]")
    for each in log:
        console().print(f"  [dim]{safe(each['at'])}[/] {safe(each['line'])}")


def cancel(id: Id, command: options.Command) -> None:
    """End a training of the queue: at once if it waits, after its step if it runs."""
    run = command.workspace.queue.cancel(id)
    after = "its worker ends it after this step" if run["state"] == "running" else str(run["state"])
    command.say(run, f"[bold]{safe(id)}[/] {safe(after)}")


def resume(id: Id, command: options.Command) -> None:
    """Put a training of the queue that has failed or was cancelled back. It resumes from its last checkpoint."""
    run = command.workspace.queue.resume(id)
    command.say(run, queued(run))


def delete(id: Id, command: options.Command) -> None:
    """Delete a training that has ended, with its curve, checkpoint and log. Its version stays."""
    command.workspace.queue.delete(id)
    command.say({"deleted": id}, f"deleted run [bold]{safe(id)}[/]")


def limit(
    *,
    tenant: Annotated[str, Argument(help="Whose trainings.", show_default=False)],
    running: Annotated[int | None, Option(help="At once; default: any number.")] = None,
    waiting: Annotated[int | None, Option(help="In the queue; default: any number.")] = None,
    command: Annotated[options.Command, options.Without(("as_json",))],
) -> None:
    """Set how many trainings of a tenant may run and wait. Without it, any number runs and 100 wait."""
    command.workspace.queue.limit(tenant, running=running, waiting=waiting)
    shown = {"run": running, "wait": waiting}
    parts = [f"{'any number' if number is None else number} may {verb}" for verb, number in shown.items()]
    console().print(f"tenant [bold]{safe(tenant)}[/]: {', '.join(parts)}")


def worker(
    *,
    until_empty: Annotated[bool, Option(help="End once nothing is due.")] = False,
    slots: Annotated[int, Option(metavar="N", min=1, help="Trainings at once; those of one base share it.")] = 4,
    most_hours: Annotated[
        float | None, Option(metavar="H", help="A training that takes longer ends as failed.")
    ] = None,
    silent_minutes: Annotated[float, Option(metavar="M", help="A training without a step or a stage is killed.")] = 60,
    bases: Annotated[
        list[str] | None, Option(metavar="PATTERN", help="Bases of the Hub that recipes may name; default: any.")
    ] = None,
    job: Annotated[str | None, Option(metavar="ID", help="Do this training or cell alone; with --exit.")] = None,
    exit_: Annotated[bool, Option("--exit", help="End after one job, of this ID or the next one.")] = False,
    command: Annotated[options.Command, options.Without(("as_json",))],
) -> None:
    """Take trainings and cells of comparisons from the queue of the store, several at once.

    Their bases stay in memory. After SIGTERM or Ctrl-C each writes a checkpoint, and another worker continues.
    With --exit the status is 0 if the job is finished or there is none, 1 if it failed, 75 if it waits for another try.
    """
    err, queue = console(stderr=True), command.workspace.queue

    def say(line: str) -> None:
        err.print(safe(line))

    if job is not None and not exit_:
        raise RecipeError("--job does one job and ends: give --exit too")
    if exit_:
        patterns = bases or ("*",)
        state = queue.work_one(job, most_hours=most_hours, silent_minutes=silent_minutes, bases=patterns, on_stage=say)
        say(f"job {job or ''} is {state}" if state else "nothing is due")
        raise typer.Exit(EXIT_STATUS.get(state or "finished", 1))
    err.print(f"working for {safe(command.store)}  [dim](Ctrl-C ends it)[/]")
    queue.work(
        until_empty=until_empty,
        slots=slots,
        most_hours=most_hours,
        silent_minutes=silent_minutes,
        bases=bases or ("*",),
        on_stage=say,
    )


def queued(run: RunRow | StudyRow) -> str:
    """A line for a run that was put into the queue."""
    return f"[bold]{safe(run['id'])}[/] waits  [dim]turret runs show {safe(run['id'])}[/]"


def _row(run: RunRow) -> tuple[str, ...]:
    state, queue = str(run["state"]), run["queue"]
    style = STYLES.get(state, "dim")
    what = run["error"] or (run["result"] or {}).get("version") or ""
    return (
        safe(run["id"]),
        f"[bold]{safe(run['name'])}[/]",
        f"[{style}]{safe(state)}[/]",
        safe("-" if queue is None else queue["priority"]),
        safe("-" if queue is None else queue["tries"]),
        safe(run["created"]),
        safe(str(what)[:120]),
    )


app = options.group("Trainings: list, show, cancel, delete.", list_, show, cancel, resume, delete, limit, alone=runs)
