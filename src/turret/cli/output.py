"""What answers look like: JSON for machines on stdout, or a few quiet lines for people. Knows no verb.

With `--json` stdout carries exactly one JSON value; whatever else is said goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from turret.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@cache
def console(*, stderr: bool = False) -> Console:
    """The terminal; made when something is said, because rich takes time to load. Piped output is never wrapped."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)
    if not made.is_terminal:
        made.width = 240
    return made


def voice(as_json: bool) -> Console:
    """Where people are spoken to: stdout, or stderr when stdout belongs to a machine."""
    return console(stderr=as_json)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """While a verb is at work: yields a function that shows what it is doing, where someone is looking."""
    where = console(stderr=True)
    if not where.is_terminal:
        yield lambda _words: None
        return
    with where.status("", spinner="dots") as live:
        yield lambda words: live.update(f"[dim]{safe(words)}[/]")


def emit(value: Any) -> None:
    """The one JSON value of a `--json` command."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def follows() -> bool:
    """Whether torchrun started this process to follow another one, which does the talking."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def complain(message: str) -> None:
    """One line of at most `LINE` characters on stderr; of several processes that fail, one says it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from turret.train.processes import tells

        if not tells():
            return
    sys.stderr.write(one_line(f"turret: {message}") + "\n")
    sys.stderr.flush()


def plainly(text: str) -> str:
    """Someone's text on one line, without control characters that would move the cursor or change colours."""
    return "".join(c if c.isprintable() else " " for c in text)


def safe(text: object) -> str:
    """Text that rich shows as it is, brackets too."""
    from rich.markup import escape

    return escape(plainly(str(text)))


def rows(cells: Iterable[Sequence[str]]) -> Table:
    """Rows in columns as wide as they need, the last one folded; the cells may carry rich's markup."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for row in cells:
        table.add_row(*row)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for column in table.columns[-1:]:
        column.overflow = "fold"
    return table


def grid(pairs: Iterable[tuple[str, str]]) -> Table:
    """Name and value in two columns."""
    return rows((f"  [dim]{name}[/]", value) for name, value in pairs)


def columns(heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A table without lines; the columns named in `right` hold numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:
        table.add_column(head, justify="right" if head in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def size(count: float | None) -> str:
    """Bytes for people: `980 B`, `87 kB`, `1.2 MB`."""
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def many(count: float) -> str:
    """A count for people: `74k`, `22.7M`."""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 1000 or unit == "B":
            break
        count /= 1000
    return f"{count:.0f}{unit}" if unit == "" or count >= 100 else f"{count:.1f}{unit}"


def counted(count: int, thing: str) -> str:
    """`1 file`, `3 files`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def span(seconds: float) -> str:
    """A duration for people: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: object) -> str:
    """A metric for people."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "?" if value is None else safe(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"


def metrics(values: Mapping[str, Any], *, most: int = 8) -> str:
    """`accuracy 0.951  loss 0.180`: the numbers; reports inside are left to `show`."""
    numbers = [(k, v) for k, v in values.items() if v is None or isinstance(v, (int, float))]
    return "  ".join(f"[dim]{safe(name)}[/] {number(value)}" for name, value in numbers[:most]) or "[dim]none[/]"
