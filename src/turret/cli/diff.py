"""`turret diff`: show two versions next to each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.output import columns, console, cut, number, report, safe, size
from turret.json_types import JsonValue

if TYPE_CHECKING:
    from turret.store.difference import Difference


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A version: name, name@3 or name@production.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another version, of any name.")],
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Show the differences between two versions: settings, metrics, sizes and weights."""
    from turret.workspace import Workspace

    report(Workspace(store).diff(first, second), as_json, _print)


def _print(found: Difference) -> None:
    a, b = (f"{safe(each)}" for each in found.versions)
    sides = [(f"  {safe(key)}", _value(left), _value(right)) for key, (left, right) in found.differs.items()]
    sides.append(("  size", size(found.bytes[0]), size(found.bytes[1])))
    console().print(columns(("differs", a, b), sides))
    measured = list(_measured(found))
    if measured:
        console().print()
        console().print(columns(("metric", a, b, "difference"), measured, right=(a, b, "difference")))
    groups = [*found.weights, *([found.moved] if found.moved else [])]
    if groups:
        rows = [(f"  {safe(each.group)}", str(each.tensors), _share(each.distance)) for each in groups]
        console().print()
        console().print(columns(("weights", "tensors", "moved"), rows, right=("tensors", "moved")))
    if found.not_compared:
        few = ", ".join(found.not_compared[:3]) + (", ..." if len(found.not_compared) > 3 else "")
        console().print(
            f"\n[dim]not compared, missing in one or of another shape: {len(found.not_compared)} ({safe(few)})[/]"
        )


def _measured(found: Difference) -> Iterator[tuple[str, ...]]:
    for split, values in found.metrics.items():
        for name, (left, right, more) in values.items():
            if "." not in name:  # --json has the metrics of each class
                change = "" if more is None else f"+{number(more)}" if more > 0 else number(more)
                yield f"  {safe(split)} {safe(name)}", number(left), number(right), change


def _value(value: JsonValue) -> str:
    if value is None:
        return "[dim]-[/]"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = text[:19] if text.startswith("sha256:") else text
    return safe(cut(text, 60))


def _share(distance: float | None) -> str:
    return "from zero" if distance is None else "0" if distance == 0 else f"{distance:.3g}"
