"""`turret diff`: two versions side by side. Decode, call, encode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turret.cli import options
from turret.cli.output import columns, console, emit, number, safe, size

if TYPE_CHECKING:
    from turret.store.difference import Difference


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="name, name@3 or name@production")],
    second: Annotated[str, typer.Argument(metavar="B", help="of the same name or another")],
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Show two versions side by side: settings, metrics, sizes, and how far the weights are apart."""
    from turret.workspace import Workspace

    found = Workspace(store).diff(first, second)
    if as_json:
        emit(found.as_json())
    else:
        _print(found)


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
            f"\n[dim]not compared, only in one or of another shape: {len(found.not_compared)} ({safe(few)})[/]"
        )


def _measured(found: Difference) -> Iterator[tuple[str, ...]]:
    for split, values in found.metrics.items():
        for name, (left, right, more) in values.items():
            if "." not in name:  # reports a class are left to --json
                change = "" if more is None else f"+{number(more)}" if more > 0 else number(more)
                yield f"  {safe(split)} {safe(name)}", number(left), number(right), change


def _value(value: Any) -> str:
    if value is None:
        return "[dim]-[/]"
    said = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    said = said[:19] if said.startswith("sha256:") else said  # as everywhere; --json has all of it
    return safe(said if len(said) <= 60 else f"{said[:57]}...")


def _share(distance: float | None) -> str:
    return "from zero" if distance is None else "0" if distance == 0 else f"{distance:.3g}"
