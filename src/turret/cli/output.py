"""How results are printed: JSON for programs, or tables and lines for people.

With `--json`, stdout has exactly one JSON value, and everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from turret.errors import one_line, printable
from turret.json_types import JsonValue, Plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from turret.location import Location
    from turret.tasks.shapes import MetricParts, Metrics

TYPED: list[str] = []  # the words of the command that runs, without `turret`


@cache
def console(*, stderr: bool = False) -> Console:
    """The terminal, made on first use because rich loads slowly. Piped output is not wrapped."""
    from rich.console import Console

    terminal = Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)
    if not terminal.is_terminal:
        terminal.width = 240
    return terminal


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows the current stage next to a spinner, if stderr is a terminal."""
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        yield lambda _text: None
        return
    with terminal.status("", spinner="dots") as spinner:
        yield lambda text: spinner.update(f"[dim]{safe(text)}[/]")


def emit(value: JsonValue) -> None:
    """Print the one JSON value of `--json`."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def offer_commands(commands: Iterable[str], store: Location | str, out: Console | None = None) -> None:
    """Print the next useful commands, with `--store` if the store is neither the usual one nor that of TURRET_STORE.

    Args:
        commands: without `turret`, such as `show news@3`.
        store: as the user named it.
    """
    named = store if isinstance(store, str) else store.given or str(store)
    usual = os.environ.get("TURRET_STORE") or ".turret"
    where = "" if named == usual else f" --store {shlex.quote(str(store))}"
    out = out or console()
    out.print("[bold]try[/]")
    for command in commands:
        out.print(f"  turret {safe(command + where)}")


def asks() -> bool:
    """Whether a question can be asked: somebody reads it on a terminal, and types on one."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def is_follower() -> bool:
    """Whether torchrun started this process, and another one prints."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def print_error(message: str) -> None:
    """Print an error as one line on stderr. If several processes of torchrun fail, only one prints."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from turret.train.distributed import reports_error

        if not reports_error():
            return
    sys.stderr.write(one_line(f"turret: {message}") + "\n")
    sys.stderr.flush()


def cut(text: str, most: int) -> str:
    """The text, or its beginning and `...` if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def safe(text: object) -> str:  # object: anything that `str` takes
    """Text without control characters that rich prints literally, brackets included."""
    from rich.markup import escape

    return escape(printable(str(text)))


def rows(cells: Iterable[Sequence[str]]) -> Table:
    """Columns as wide as necessary, without heads; only the last one folds. Cells may have rich's markup."""
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
    """Two columns: name and value."""
    return rows((f"  [dim]{name}[/]", value) for name, value in pairs)


def columns(heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A table without lines. right: the heads of the columns that hold numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:
        table.add_column(head, justify="right" if head in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def class_table(classes: MetricParts) -> Table:
    """Precision, recall, F1 and support of every class."""
    names = ("precision", "recall", "f1", "support")
    rows = [(f"  {safe(label)}", *(number(row.get(name)) for name in names)) for label, row in classes.items()]
    return columns(("class", *names), rows, right=names)


def number(value: Plain) -> str:
    """The value of a metric. Nothing below 1 is `1.000`: an accuracy of 0.9996 is `0.999`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "?" if value is None else safe(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) >= 10 else f"{0.999 if 0.999 < value < 1 else value:.3f}"


def metrics(values: Metrics, *, most: int = 8) -> str:
    """`accuracy 0.951  loss 0.180`: the numbers among the values."""
    numbers = [(k, v) for k, v in values.items() if v is None or isinstance(v, (int, float))]
    return "  ".join(f"[dim]{safe(name)}[/] {number(value)}" for name, value in numbers[:most]) or "[dim]none[/]"


def split_metrics(split: str, values: Metrics) -> str:
    """The metrics of one split, or the forgetting of a version."""
    return safe(_forgot(values)) if split == "forgetting" else metrics(values)


def _forgot(values: Metrics) -> str:
    """`neutral text +0.031 (+0.012 to +0.050)  headlines@3 +0.20 (+0.11 to +0.31)`: increases of the loss per token."""
    from turret.tasks.shapes import number_in, parts_in

    names = ("neutral", "neutral_low", "neutral_high")
    parts = [("neutral text", *(number_in(values, name) for name in names))]
    parts += [
        (version, each.get("increase"), each.get("low"), each.get("high"))
        for version, each in parts_in(values, "against").items()
    ]
    shown = (
        f"{name} {_signed_number(mean)} ({_signed_number(low)} to {_signed_number(high)})"
        for name, mean, low, high in parts
    )
    return "  ".join(shown)


def _signed_number(value: Plain) -> str:
    return f"{value:+.3f}" if isinstance(value, int | float) else "?"
