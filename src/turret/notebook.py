"""How objects look in a notebook: small, escaped HTML that sets no colour, so that light and dark themes set them."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from turret.amounts import percentage
from turret.json_types import Plain

if TYPE_CHECKING:
    from turret.tasks.shapes import Metrics, SplitMetrics

Cell = str | int | float | None

_SHARES = ("accuracy", "f1", "precision", "recall", "ece", "share", "coverage")  # of 0 to 1, by the end of a name
_MARKS = {"ok": "✓ ", "warn": "⚠ ", "refuse": "✗ "}


@dataclass(frozen=True)
class Table:
    """A small table.

    Args:
        columns: their names; no header if all are empty.
        rows: texts, and numbers, which are aligned to the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def html(self) -> str:
        head = "".join(_cell("th", each) for each in self.columns) if any(self.columns) else ""
        body = "".join(f"<tr>{''.join(_cell('td', each) for each in row)}</tr>" for row in self.rows)
        top = f"<thead><tr>{head}</tr></thead>" if head else ""
        return f'<div style="overflow-x:auto"><table style="margin:.3em 0">{top}<tbody>{body}</tbody></table></div>'


def as_html(title: str, facts: Mapping[str, Cell], *parts: Table | str, notes: Iterable[str] = ()) -> str:
    """A title, facts, tables and sentences.

    Args:
        facts: name -> value; those that are None or empty are left out.
        parts: tables, and texts, which are escaped.
        notes: sentences in smaller print.
    """
    given = [f"{_dim(name)} {_text(value)}" for name, value in facts.items() if value not in (None, "")]
    body = [f"<div><strong>{_text(title)}</strong></div>"]
    body += [f'<div style="margin:.2em 0;line-height:1.6">{" &nbsp;·&nbsp; ".join(given)}</div>'] if given else []
    body += [each.html() if isinstance(each, Table) else f"<div>{_text(each)}</div>" for each in parts]
    body += [f'<div style="font-size:.9em;opacity:.75">{_text(each)}</div>' for each in notes]
    return f'<div style="margin:.4em 0;max-width:64em">{"".join(body)}</div>'


def metrics_table(metrics: SplitMetrics) -> Table:
    """A row for each split with the metrics that are numbers."""
    splits = {split: each for split, each in metrics.items() if isinstance(each, Mapping)}
    names = list(dict.fromkeys(key for each in splits.values() for key, value in each.items() if _is_number(value)))
    rows = [[split, *(format_metric(name, each.get(name)) for name in names)] for split, each in splits.items()]
    return Table(["", *(name.replace("_", " ") for name in names)], rows)


def class_table(metrics: Metrics) -> Table | None:
    """Precision and recall of each class; None if the metrics have no classes."""
    found = metrics.get("per_class")
    classes = found if isinstance(found, Mapping) else {}
    by_class = {label: each for label, each in classes.items() if isinstance(each, Mapping)}
    if not by_class:
        return None
    names = list(dict.fromkeys(key for each in by_class.values() for key in each))
    rows = [[label, *(format_metric(name, each.get(name)) for name in names)] for label, each in by_class.items()]
    return Table(["class", *(name.replace("_", " ") for name in names)], rows)


def format_metric(name: str, value: Plain) -> Cell:
    """A metric as people read it: a share in percent, another number with three digits."""
    if not _is_number(value):
        return None
    if isinstance(value, int):
        return f"{value:,}"
    return percentage(value) if name.endswith(_SHARES) else f"{value:.3g}"


def mark_level(level: str, text: str) -> str:
    """A text with the mark of its level: ok, warn or refuse."""
    return f"{_MARKS.get(level, '')}{text}"


def in_notebook() -> bool:
    """Whether this program is a cell of a notebook, whose kernel shows rich output."""
    found = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(found, "kernel", None) is not None


def _is_number(value: Plain) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(tag: str, value: Cell) -> str:
    number = isinstance(value, (int, float)) or (isinstance(value, str) and re.fullmatch(r"[\d.,]+%?", value))
    return f'<{tag} style="text-align:{"right" if number else "left"}">{_text(value)}</{tag}>'


def _dim(text: str) -> str:
    return f'<span style="opacity:.65">{_text(text)}</span>'


def _text(value: Cell) -> str:
    return "" if value is None else html.escape(str(value))
