"""The pages of an evaluation, of one version and of a panel: self-contained HTML, without scripts.

The page of a panel has for each question the error by the share that is decided, and its reliability. The console shows
these plots too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from turret.amounts import many, percentage, size, span
from turret.compare.plots import Mark, agreement, error_by_share, reliability
from turret.compare.report_text import (
    milliseconds,
    one_decimal,
    p_value_text,
    percent,
    sentence,
    shorten_text,
    signed_number,
)
from turret.compare.results import (
    MISTAKES,
    Details,
    QuestionResult,
    error_interval,
    spread_out,
    wilson,
)
from turret.data import Input, Prompt, TextPair
from turret.json_types import JsonMapping, Plain, mapping_of
from turret.tasks import Measure, Mistake, Task, main_metric, measure_of, task_measured_by
from turret.tasks.calibration import Bin, Decided, Sureness
from turret.tasks.shapes import Metrics, number_of, parts_in

if TYPE_CHECKING:
    from turret.workspace.results import Evaluation, PanelEvaluation

# --- pages ------------------------------------------------------------------------------------------------------------
# The template environment of the reports: the templates of this package, escaping, and number formats.


def environment(html: bool) -> Environment:
    """The environment for HTML, which escapes everything, or for Markdown, where the filter `cell` escapes."""
    templates = Environment(
        loader=PackageLoader("turret.compare", "."),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "count": many,
        "mb": size,
        "ms": milliseconds,
        "percent": percent,
        "points": one_decimal,
        "seconds": span,
        "share": percentage,
        "sentence": sentence,
        "signed": signed_number,
        "cell": _cell,
        "p": p_value_text,
    }
    return templates


def _cell(value: Plain) -> str:
    """A value as text in Markdown, on one line and escaped."""
    line = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\|`*_[]<>#" else c for c in line)


def describe_run(made: Mapping[str, Plain]) -> Iterator[tuple[str, str]]:
    """(name, value) of dates, device and versions of the trainings. made: by `results.made_with`."""
    if not made:
        return
    first, last = str(made["from"])[:10], str(made["to"])[:10]
    yield "date", first if first == last else f"{first} to {last}"
    for key in ("device", "threads", "precision", "commit"):
        value = made.get(key)
        if value is not None:
            yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for versions in made["versions"] if isinstance(made["versions"], list) else [made["versions"]]:
        yield "versions", ", ".join(f"{name} {version}" for name, version in mapping_of(versions).items() if version)


# --- evaluation page --------------------------------------------------------------------------------------------------


MOST_CLASSES = 20  # in the confusion matrix; of more, the most frequent confusions are listed
PAIRS = 20
INLINE = 80  # characters of an answer that has no lines of its own
FIRST_MISTAKES = 8  # the others are folded
REMARK = "The worst answers are often wrong in the data and not in the version: read them first."
TEXT = 600  # characters of a text


def as_html(found: Evaluation, *, texts: bool) -> str:
    """The page.

    Args:
        texts: whether it shows texts of the data and outputs.
    """
    metrics, details = found.metrics, found.details
    page = environment(html=True).get_template("evaluation.html.j2")
    return page.render(
        evaluation=found,
        headline=headline(found.version, int(found.data["examples"]), metrics, details),
        numbers=list(numbers(metrics, details.task)),
        classes=dict(parts_in(metrics, "per_class")),
        shown=shown_details(details, metrics, MISTAKES if texts else 0),
        first=FIRST_MISTAKES,
        texts=texts,
        parts=(),  # of memory, which the style sheet colours
    )


def shown_details(details: Details, metrics: Metrics, mistakes: int) -> JsonMapping:
    """Details of an evaluation as the templates show them: the first `mistakes`, and everything else.

    Args:
        metrics: of the same examples.
    """
    confusion, task = details.confusion, task_measured_by(metrics, details.task)
    drawn = [(question, each, reliability_plot(each.bins)) for question, each in details.reliability.items()]
    return {
        "matrix": confusion if confusion is not None and len(confusion.labels) <= MOST_CLASSES else None,
        "pairs": [] if confusion is None else confusion.pairs(PAIRS),  # right, answered, count
        "plots": [each for each in drawn if each[2]],  # question, its reliability, SVG
        "residuals": _residuals(details.numbers),
        "coverage": details.coverage,
        "mistakes": [shown_mistake(each, task) for each in details.mistakes[:mistakes]],
        "title": task.errors,
        "levels": not task.right_or_wrong,  # whether a class is a level
        "remark": REMARK if task.right_or_wrong or details.numbers else "",
    }


def headline(version: str, examples: int, metrics: Metrics, details: Details) -> str:
    """`news@1 is wrong on 12 of 200 examples`."""
    wrong = len(details.mistakes)
    if task_measured_by(metrics, details.task).right_or_wrong:
        return f"{version} is {'right on all' if not wrong else f'wrong on {wrong} of'} {examples} examples"
    name = main_metric(metrics, details.task)
    if name is None:
        return f"{version} on {examples} examples"
    measure = measure_of(name, metrics, details.task)
    return f"{version}: {measure.name} {_format_measure(measure, number_of(metrics, name))} on {examples} examples"


def numbers(metrics: Metrics, kind: str) -> Iterator[tuple[str, str, str]]:
    """(name, value, what it means) of each metric."""
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            measure = measure_of(name, metrics, kind)
            title = f"{measure.name} ({measure.unit})" if measure.unit else measure.name
            yield title, _format_measure(measure, value), measure.says


def _format_measure(measure: Measure, value: float) -> str:
    if measure.share:
        return percentage(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def reliability_plot(bins: Sequence[Bin]) -> str:
    """How often answers are right by their probability; empty without answers."""
    if not bins:
        return ""
    total = sum(each.count for each in bins)
    marks = [
        Mark(
            f"{each.count} answers with {each.low:.2f} to {each.high:.2f}: {each.accuracy:.0%} right",
            "lora",  # a colour of the style sheet
            each.confidence,
            each.accuracy,
            *wilson(each.accuracy, each.count),
        )
        for each in bins
    ]
    shares = [each.count / total for each in bins]
    return reliability(marks, shares)


def _residuals(numbers: Sequence[tuple[float, float]]) -> str:
    some = spread_out(numbers)
    return agreement(some) if len(set(some)) > 1 else ""


def shown_mistake(each: Mistake, task: type[Task]) -> JsonMapping:
    """A mistake as the template shows it. long: whether an answer takes lines of its own."""
    right, given = _words(each.right), _words(each.given)
    return {
        "row": each.row,
        "error": each.error,
        "asked": [(name, shorten_text(text, TEXT)) for name, text in _input_texts(each.asked, task)],
        "answers": [(task.sides[1], given or "(nothing)", "given"), (task.sides[0], right, "right")],
        "long": max(len(right), len(given)) > INLINE,
    }


def _input_texts(asked: Input, task: type[Task]) -> list[tuple[str, str]]:
    """The texts that were asked, with their names where there are several."""
    if isinstance(asked, TextPair):
        return list(zip(task.texts, (asked.text, asked.text_pair), strict=True))
    if isinstance(asked, Prompt):
        turns = [(turn.role, turn.content or turn.tool_calls) for turn in asked.turns]
        return turns if len(turns) > 1 else [("", turns[0][1])]
    return [("", asked)]


def _words(value: str | list[str]) -> str:
    return shorten_text(value if isinstance(value, str) else ", ".join(value) or "no label", TEXT)


# --- the page of a panel ----------------------------------------------------------------------------------------------


SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)  # of the answers, in the table beside the plot
PANEL_MISTAKES = 20  # of a question
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
    return error_by_share(points, chosen, now, None if bound is None else 100 * bound)


def panel_html(found: PanelEvaluation, *, texts: bool) -> str:
    """The page.

    Args:
        texts: whether it shows texts of the data.
    """
    page = environment(html=True).get_template("panel.html.j2")
    return page.render(
        evaluation=found,
        questions=[_question_view(each, texts) for each in found.questions],
        first=FIRST,
        texts=texts,
        parts=(),  # of memory, which the style sheet colours
    )


def _question_view(each: QuestionResult, texts: bool) -> JsonMapping:
    """A question as the template shows it."""
    task = task_measured_by(each.metrics, each.details.task)
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
        "mistakes": [shown_mistake(one, task) for one in each.details.mistakes[:PANEL_MISTAKES]] if texts else [],
    }


def _at(found: Sureness, threshold: float | None) -> Decided:
    """What the threshold decides, under the threshold itself."""
    at = found.at(threshold)
    return at if threshold is None else Decided(threshold, at.count, at.wrong)


def _step(found: Sureness, decided: Decided, chosen: bool) -> Step:
    low, high = error_interval(decided)
    share, error = decided.count / found.answers, decided.error
    return Step(decided.threshold, chosen, 100 * share, None if error is None else 100 * error, 100 * low, 100 * high)
