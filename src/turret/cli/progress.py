"""What `turret train` prints: the recipe and the plan, a progress bar, and the result.

The bar goes to stderr. If stderr is no terminal, a line after each tenth of the steps replaces it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from turret.cli.output import console, grid, many, measured, number, offer, rows, safe, size, span
from turret.json_types import Plain
from turret.tasks import main_metric

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from turret.plan_check import Check
    from turret.recipe import Recipe
    from turret.train.curve import StepRecord
    from turret.workspace import Planned, RunResult

BAR = 16  # characters of the progress bar
SIGNS = {"ok": "  [green]ok[/]", "warn": "  [yellow]warn[/]", "refuse": "  [red]refuse[/]"}
SHOWN = {  # settings that are printed even at their defaults
    "task": ("kind", "max_tokens"),
    "method": ("kind", "r", "lora_alpha", "lora_dropout", "num_virtual_tokens"),
    "train": ("epochs", "batch_size", "lr", "dtype"),
}


class Progress:
    """Prints the reports of `Workspace.train`, and its result."""

    def __init__(self, as_json: bool) -> None:
        self._out = console(stderr=as_json)
        self._err = console(stderr=True)
        self._live = self._err.is_terminal
        self._status: Status | None = None
        self._bar: Bar | None = None
        self._loss: float | None = None
        self._metric = ""
        self._printed = -1  # tenths of the steps
        self._seconds, self._steps = 0.0, 0  # of this process

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def stage(self, text: str) -> None:
        """Work without steps has started."""
        self._clear()
        if self._live:
            self._status = self._err.status(f"[dim]{safe(text)}[/]", spinner="dots")
            self._status.start()
        else:
            self._err.print(f"[dim]{safe(text)}[/]")

    def warning(self, text: str) -> None:
        """Something failed that does not stop the training."""
        self._clear()
        self._err.print(f"[yellow]warn[/]  {safe(text)}")

    def planned(self, planned: Planned) -> None:
        self._clear()
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

    def stored(self, result: RunResult, store: str) -> None:
        """The training has ended."""
        self._clear()
        print_result(result, store, self._out)

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
            self._clear()
            columns = (
                SpinnerColumn(),
                BarColumn(bar_width=BAR),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.description}"),
                TimeRemainingColumn(),
                TextColumn("[dim]left[/]"),
            )
            self._bar = Bar(*columns, console=self._err, transient=True)
            self._bar.add_task("", total=record.steps, completed=record.step - 1)
            self._bar.start()
        room = self._err.width - len(f"s {BAR * '-'} {record.step}/{record.steps}  ") - len(" 0:00:00 left")
        self._bar.update(self._bar.task_ids[0], completed=record.step, description=self._text(record, room))

    def _clear(self) -> None:
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


def print_result(result: RunResult, store: str, out: Console) -> None:
    """Print what was stored, its cost, and the next commands."""
    out.print(f"[bold green]{safe(result.version)}[/]  [dim]{safe(result.digest)}[/]")
    out.print(grid(_result(result)))
    for warning in result.warnings:
        out.print(f"  [yellow]warn[/]  {safe(warning)}")
    for advice in result.advice:
        out.print(f"  [yellow]advice[/]  {safe(advice)}")
    offer(
        [
            f'predict {result.version} "a text of your own"',
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
        yield split, measured(split, values)
    if result.forgetting is not None:
        yield "forgetting", measured("forgetting", result.forgetting)
    trainable, total = result.parameters["trainable"], result.parameters["total"]
    share = f"{many(trainable)} of {many(total)} parameters, {100 * trainable / max(total, 1):.2g}%"
    yield "size", f"{size(result.bundle_bytes)}  [dim]trained[/] {share}"
    yield "time", _time(result.timing)
    yield "memory", _memory(result.memory)
    resumed = f"  [dim]resumed from step {result.resumed_from}[/]" if result.resumed_from else ""
    early = "  [dim]stopped early[/]" if result.stopped_early else ""
    yield "run", f"{safe(result.run)}{resumed}{early}"


def _time(timing: Mapping[str, float]) -> str:
    parts = [f"[dim]{part}[/] {span(timing[f'{part}_seconds'])}" for part in ("load", "train", "evaluate", "proof")]
    return "  ".join([*parts, f"{timing['steps']:.0f} steps", f"{many(timing['tokens_per_second'])} tokens/s"])


def _memory(memory: Mapping[str, int | None]) -> str:
    peak = f"[dim]peak[/] {size(memory['peak_bytes'])}, {size(memory['above_base_bytes'])} above the loaded base"
    return f"{peak}  [dim]predicted[/] {size(memory['predicted_bytes'])}" if memory["predicted_bytes"] else peak
