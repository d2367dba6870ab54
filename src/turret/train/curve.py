"""The training curve: one record per optimiser step, kept in a file of JSON lines, and shown as table and picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from turret.disk import replace_text
from turret.errors import NotInstalled
from turret.notebook import Table, as_html, format_metric
from turret.tasks import main_metric, measure_of
from turret.tasks.shapes import Metrics, number_of

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. `loss` is the mean over the batch before the update.

    Only times and memory differ between a run and its repetition.
    """

    step: int  # 1, 2, ... steps
    steps: int  # of the whole run, unless it stops early
    epoch: float  # epochs done after this step: 1.5 is the middle of the second
    loss: float  # over examples (classify) or target tokens (generate)
    lr: float
    grad_norm: float  # before clipping
    examples: int
    tokens: int  # source and target tokens of this step
    seconds: float  # of this step, without its evaluation
    tokens_per_second: float
    rss: int  # resident bytes of the process after the step
    metrics: Metrics | None = None  # of an evaluation after this step
    split: str | None = None  # of those metrics: validation, or test (only reported, never used to choose)
    guessing: float | None = None  # the loss of guessing, if the latest losses are no better

    def to_json(self) -> str:
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        return cls(**json.loads(line))


class RunCurve(list[StepRecord]):
    """The steps of a run, oldest first: a sequence of records, a DataFrame with `to_frame`, a picture with `plot`."""

    def __repr__(self) -> str:
        if not self:
            return "no steps yet"
        first, last = self[0], self[-1]
        return f"{last.step} of {last.steps} steps, loss {first.loss:.3f} -> {last.loss:.3f}"

    def _repr_html_(self) -> str:
        rows = [
            (each.step, str(each.split), *(format_metric(name, each.metrics.get(name)) for name in self._metrics()))
            for each in self
            if each.metrics is not None
        ]
        table = Table(("step", "measured on", *(name.replace("_", " ") for name in self._metrics())), rows)
        return as_html(
            "Curve", {}, repr(self), *([table] if rows else []), notes=["plot() draws it; to_frame() lists it"]
        )

    def to_frame(self) -> pandas.DataFrame:
        """A DataFrame with a row for each step, and a column for each metric, such as "validation accuracy".

        Raises:
            NotInstalled: pandas is not installed.
        """
        frames = _package("pandas", "to_frame")
        rows = []
        for each in self:
            fields = {key: value for key, value in asdict(each).items() if key not in ("metrics", "split")}
            numbers = {name: (each.metrics or {}).get(name) for name in self._metrics()}
            rows.append(fields | {f"{each.split} {name}": n for name, n in numbers.items() if n is not None})
        return frames.DataFrame(rows).set_index("step") if rows else frames.DataFrame()

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Draw the loss over the steps, with its running mean, and the metric of each evaluation on a second axis.

        Args:
            ax: axes of matplotlib to draw on; default: those of a new figure.

        Returns:
            The axes, on which more can be drawn.

        Raises:
            NotInstalled: matplotlib is not installed.
        """
        pyplot = _package("matplotlib.pyplot", "plot")
        axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")[1] if ax is None else ax
        steps, losses = [each.step for each in self], [each.loss for each in self]
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(steps, _running_mean(losses), color="tab:blue", linewidth=2, label="training loss")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        lines, labels = axes.get_legend_handles_labels()
        metric = next((name for name in self._metrics() if name != "loss"), None)
        seen = [each for each in self if metric is not None and (each.metrics or {}).get(metric) is not None]
        if metric is not None and seen:
            twin = axes.twinx()
            splits = dict.fromkeys(str(each.split) for each in seen)
            for split, color in zip(splits, ("tab:orange", "tab:green", "tab:red"), strict=False):
                own = [each for each in seen if str(each.split) == split]
                values = [number_of(each.metrics or {}, metric) for each in own]
                label = f"{split} {metric}".replace("_", " ")
                twin.plot([each.step for each in own], values, "o-", color=color, label=label)
            twin.set_ylabel(metric.replace("_", " "))
            if all(0 <= number_of(each.metrics or {}, metric) <= 1 for each in seen):
                twin.set_ylim(0, 1.05)
            more = twin.get_legend_handles_labels()
            lines, labels = [*lines, *more[0]], [*labels, *more[1]]
        axes.legend(lines, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
        return axes

    def _metrics(self) -> list[str]:
        """The names of the metrics that are numbers, the first one first."""
        found = (each.metrics.items() for each in self if each.metrics)
        return list(dict.fromkeys(name for items in found for name, value in items if isinstance(value, float)))


def _running_mean(values: Sequence[float], keep: float = 0.85) -> list[float]:
    """The exponential running mean, without the pull of its start."""
    means, mean, weight = list[float](), 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def _package(name: str, call: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise NotInstalled(f"{call} needs {package}, which is not installed: run `pip install {package}`") from None


class Curve:
    """The file `curve.jsonl` of a run. A resumed run drops the records after its checkpoint and writes them again."""

    def __init__(self, path: Path, *, resume_after: int = 0) -> None:
        self.path = path
        kept = [record for record in read_curve(path) if record.step <= resume_after]
        replace_text(path, "".join(record.to_json() + "\n" for record in kept))

    def append(self, record: StepRecord) -> None:
        """Add a record to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")


RISE = 0.2  # of the lowest held-out loss: a smaller rise may be chance


def learnt_by_heart(records: Sequence[StepRecord]) -> str | None:
    """The sentence of a training that learnt its examples by heart after the evaluation with the lowest loss.

    That is said if the held-out loss rose by a fifth or more since and the task's metric, where one was measured, fell.
    A metric alone falls by chance, and a loss alone rises where answers are only too sure.
    """
    seen = [(each, each.metrics) for each in records if each.metrics is not None and "loss" in each.metrics]
    if not seen:
        return None
    (best, before), (last, after) = min(seen, key=lambda pair: number_of(pair[1], "loss")), seen[-1]
    name = main_metric(after) or "loss"
    rose = number_of(after, "loss") >= (1 + RISE) * number_of(before, "loss")
    if not rose or (name != "loss" and number_of(after, name) >= number_of(before, name)):
        return None
    changes = [
        f"{measure_of(each, after).name} went from {format_metric(each, before[each])} "
        f"to {format_metric(each, after[each])}"
        for each in dict.fromkeys(("loss", name))
    ]
    span = f"from step {best.step} to step {last.step}, on the {last.split} split,"
    return f"the training examples were learnt by heart: {span} {' and '.join(changes)}"


def read_curve(path: Path) -> Iterator[StepRecord]:
    """The records of the file. A last line that a kill cut short is left out."""
    if path.exists():
        yield from parse_curve(path.read_bytes())


def parse_curve(content: bytes) -> Iterator[StepRecord]:
    """The records in the content of such a file."""
    for line in content.decode("utf-8", "replace").splitlines():
        try:
            yield StepRecord.from_json(line)
        except (ValueError, TypeError):
            return
