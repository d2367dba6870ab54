"""What `turret evaluate` prints and writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from turret.cli.output import columns, console, cut, grid, metrics, number, safe, span
from turret.errors import DataError, plainly, shown

if TYPE_CHECKING:
    from turret.compare.results import Details, Mistake
    from turret.workspace import Evaluation

CLASSES = 12  # at most in the confusion matrix on a screen
MISTAKES = 5  # on a screen


def check_targets(out: Path | None, page: Path | None) -> None:
    """Raise DataError, before anything is measured, for a file that cannot be written."""
    from turret.data.table_writer import check_target

    if out is not None:
        check_target(out)
    if page is not None and (page.suffix.lower() not in (".html", ".htm") or not page.absolute().parent.is_dir()):
        raise DataError(f"--report {shown(str(page), 100)}: expected a .html file in a folder that exists")


def written(found: Evaluation, out: Path | None, page: Path | None, texts: bool) -> list[str]:
    """Write the files that were asked for, and say which."""
    from turret.workspace import evaluation

    notes = []
    if out is not None:
        table = evaluation.write_mistakes(found, out)
        guarded = f"; {table.guarded} cells begin like a formula and have a ' in front" if table.guarded else ""
        notes.append(f"{len(found.details.mistakes)} wrong answers are in {out}{guarded}")
    if page is not None:
        evaluation.write_page(found, page, texts=texts)
        notes.append(f"the report is {page}")
    return notes


def print_evaluation(found: Evaluation, notes: list[str]) -> None:
    """Metrics, the table by class, confusions, calibration and the surest mistakes. notes: on files."""
    out, details = console(), found.details
    out.print(f"[bold]{safe(found.version)}[/] on {safe(found.data['source'])}")
    rows = [("metrics", metrics(found.metrics)), ("examples", f"{found.data['examples']} in {span(found.seconds)}")]
    rows += [(name, safe(text)) for name, text in _calibration(details)]
    out.print(grid(rows + [("note", safe(note)) for note in found.notes]))
    if classes := found.metrics.get("per_class"):
        heads = ("precision", "recall", "f1", "support")
        by_class = [(f"  {safe(name)}", *(number(row[head]) for head in heads)) for name, row in classes.items()]
        out.print()
        out.print(columns(("class", *heads), by_class, right=heads))
    _print_confusion(details)
    _print_mistakes(details)
    for note in notes:
        out.print(f"[dim]{safe(note)}[/]")


def _calibration(details: Details) -> Iterator[tuple[str, str]]:
    found = details.reliability
    if found is not None and found.temperature is not None and found.raw_ece is not None:
        without = f"{found.raw_ece:.3f} without it"
        yield "calibration", f"ECE {found.ece:.3f} with temperature {found.temperature:.3g}, {without}"
    elif found is not None:
        yield "calibration", f"ECE {found.ece:.3f}; none is stored, because no validation split was there in training"
    if details.coverage is not None:
        c = details.coverage
        span = f"{c.measured:.1%} ({c.low:.1%} to {c.high:.1%})"
        yield "coverage", f"{c.coverage:.0%} sets hold the right label in {span}, with {c.mean_size:.2f} labels each"


def _print_confusion(details: Details) -> None:
    confusion = details.confusion
    if confusion is None or not details.mistakes:
        return
    out = console()
    out.print()
    if len(confusion.labels) <= CLASSES:
        heads = tuple(map(safe, confusion.labels))
        rows = [
            (f"  {safe(label)}", *(str(count) if count else "[dim]·[/]" for count in counts))
            for label, counts in zip(confusion.labels, confusion.counts, strict=True)
        ]
        out.print(columns(("right \\ answered", *heads), rows, right=heads))
        return
    pairs = [(f"  {safe(right)}", safe(given), str(count)) for right, given, count in confusion.pairs(8)]
    out.print(columns(("right", "answered", "times"), pairs, right=("times",)))


def _print_mistakes(details: Details) -> None:
    if not details.mistakes:
        return
    out, count = console(), len(details.mistakes)
    shown = details.mistakes[:MISTAKES]
    words = "the most confident wrong answers" if details.right_or_wrong else "the worst outputs"
    more = f" of {count}" if count > len(shown) else ""
    out.print(f"\n[dim]{words}, {len(shown)}{more}[/]")
    for each in shown:
        sure = f" {each.confidence:.2f}" if each.confidence is not None else f" {each.score:.2f}"
        out.print(f"  [dim]row {each.row}[/]  [red]{safe(_short(each.given, 40))}[/]{sure}  {_right(each)}")
        out.print(f"    [dim]{safe(_short(each.text, 100))}[/]")


def _right(each: Mistake) -> str:
    return f"[green]{safe(_short(each.right, 40))}[/] [dim]is right[/]"


def _short(value: str | list[str], most: int) -> str:
    return cut(plainly(value if isinstance(value, str) else ", ".join(value) or "none"), most)
