"""The page of an evaluation of a panel: for each question the error by the share that is decided, and its reliability.

The plots are those of the console too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turret.compare.evaluation_page import environment, numbers, reliability_plot, shown_mistake
from turret.compare.plots import Mark, error_by_share
from turret.compare.results import QuestionResult, error_interval, wilson
from turret.json_types import JsonMapping
from turret.tasks import measuring
from turret.tasks.calibration import Decided, Sureness

SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)  # of the answers, in the table beside the plot
MISTAKES = 20  # of a question
FIRST = 3  # the others are folded


@dataclass(frozen=True)
class Step:
    """A row of the table beside the plot. All but the threshold in %; error is None if nothing is decided."""

    threshold: float
    chosen: bool  # whether it is the question's threshold
    share: float
    error: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Live:
    """What became of answers that a promise covers."""

    share: float  # of the answers, that was decided
    outcomes: int  # of decided answers
    wrong: int


def steps(found: Sureness, threshold: float | None) -> list[Step]:
    """What the threshold decides, and what others would, the strictest first."""
    others = [next(each for each in found.curve if each.count >= share * found.answers) for share in SHARES]
    chosen = [] if threshold is None else [_at(found, threshold)]
    every = {(each.threshold, each.count): each for each in (*others, *chosen)}
    return [_step(found, each, each in chosen) for each in sorted(every.values(), key=lambda each: -each.threshold)]


def decided_plot(found: Sureness, threshold: float | None, bound: float | None, live: Live | None = None) -> str:
    """The error among the decided answers by the share that is decided, as SVG; empty without answers.

    Args:
        bound: of a promise, a share.
    """
    if not found.curve:
        return ""
    points = [(100 * each.count / found.answers, 100 * (each.error or 0.0)) for each in found.curve if each.count]
    chosen = now = None
    if threshold is not None and (at := _step(found, _at(found, threshold), chosen=True)).error is not None:
        chosen = Mark(f"threshold {at.threshold:.3g}", "full", at.share, at.error, at.low, at.high)
    if live is not None and live.outcomes:
        error = live.wrong / live.outcomes
        low, high = wilson(error, live.outcomes)
        colour = "prefix"  # of the style sheet
        now = Mark("live outcomes", colour, 100 * live.share, 100 * error, 100 * low, 100 * high)
    return error_by_share(
        points,
        chosen,
        now,
        None if bound is None else 100 * bound,
        x_label="share of the answers that is decided, %",
        y_label="wrong among these, %",
    )


def as_html(
    *,
    panel: str,
    source: str,
    examples: int,
    questions: Sequence[QuestionResult],
    notes: Sequence[str],
    texts: bool,
) -> str:
    """The page.

    Args:
        texts: whether it shows texts of the data.
    """
    page = environment(html=True).get_template("panel.html.j2")
    return page.render(
        panel=panel,
        source=source,
        examples=examples,
        questions=[_shown(each, texts) for each in questions],
        first=FIRST,
        texts=texts,
        notes=notes,
        parts=(),  # of memory, which the style sheet colours
    )


def _shown(each: QuestionResult, texts: bool) -> JsonMapping:
    """A question as the template shows it."""
    task = measuring(each.metrics, each.details.task)
    (found,) = each.details.reliability.values()
    chosen = _step(each.sureness, _at(each.sureness, each.threshold), chosen=True)
    return {
        "result": each,
        "accuracy": each.metrics["accuracy"],
        "numbers": list(numbers(each.metrics, each.details.task)),
        "chosen": chosen,
        "plot": decided_plot(each.sureness, each.threshold, each.bound),
        "steps": steps(each.sureness, each.threshold),
        "found": found,
        "reliability": reliability_plot(found.bins),
        "title": task.errors,
        "mistakes": [shown_mistake(one, task) for one in each.details.mistakes[:MISTAKES]] if texts else [],
    }


def _at(found: Sureness, threshold: float | None) -> Decided:
    """What the threshold decides, under the threshold itself."""
    at = found.at(threshold)
    return at if threshold is None else Decided(threshold, at.count, at.wrong)


def _step(found: Sureness, decided: Decided, chosen: bool) -> Step:
    low, high = error_interval(decided)
    share, error = decided.count / found.answers, decided.error
    return Step(decided.threshold, chosen, 100 * share, None if error is None else 100 * error, 100 * low, 100 * high)
