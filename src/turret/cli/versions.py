"""`turret list` and `turret show`: the versions in the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.output import columns, console, cut, emit, grid, measured, number, report, safe, size, span
from turret.errors import NotFound, counted
from turret.json_types import JsonMapping, JsonValue, part
from turret.tasks import main_metric
from turret.tasks.calibration import stored_by_question
from turret.timestamp import to_minute

if TYPE_CHECKING:
    from rich.table import Table

    from turret.store import Compared, Version
    from turret.store.difference import Difference


# --- diff -------------------------------------------------------------------------------------------------------------
# `turret diff`: show two versions next to each other.


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


# --- versions ---------------------------------------------------------------------------------------------------------


FEW = 40  # of more versions, `list` shows the newest of each name and those with an alias
MOVES = 12  # of the aliases, the newest ones
_KEEP = "the plain name does not mean it: turret promote {} production keeps it"


def list_(
    name: Annotated[str | None, typer.Argument(help="Only this adapter.", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="A line for each version of a comparison too.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """List adapters, versions, aliases and metrics.

    The trainings of a comparison are one line: a plain name never means them. `promote NAME@N production` keeps one.
    """
    from turret.store import folded
    from turret.workspace import Workspace

    found = Workspace(store).list(name)
    if as_json:
        emit({"store": str(store), "versions": [version.as_json() for version in found]})
        return
    own, compared = (found, []) if every else folded(found)
    shown = own if name or every else chosen(own)
    _print_list(shown, compared, len(own) - len(shown), f"{f'{name} in ' if name else ''}{store}")


def show(
    reference: options.Ref,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print only its recipe, which `turret train` accepts.")
    ] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Show one version: settings, metrics, lineage, files, and the moves of its aliases."""
    from turret.workspace import Workspace

    shown = Workspace(store).show(reference)
    if recipe:
        _print_recipe(shown, as_json)
    elif as_json:
        emit(shown)
    else:
        _print_show(shown)


def chosen(found: Sequence[Version]) -> Sequence[Version]:
    """All versions if they are few; else those with an alias, and the newest of each name."""
    newest = {version.name: version.number for version in found}  # ordered by number
    if len(found) <= FEW:
        return found
    return [version for version in found if version.aliases or version.number == newest[version.name]]


def age(created: str) -> str:
    """The time since then, such as `5 min 00 s` or `3 days`."""
    passed = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    return span(passed) if passed < 86400 * 2 else f"{passed / 86400:.0f} days"


def _print_list(found: Sequence[Version], compared: Sequence[Compared], more: int, where: str) -> None:
    if not found and not compared:
        console().print(f"no version of {safe(where)} yet: [bold]turret train reviews.csv[/] makes one")
        return
    heads = ("version", "alias", "method", "base", "metric", "size", "age")
    lines = [(each.name, each.number, _row(each)) for each in found]
    lines += [(each.name, each.versions[0].number, _folded(each)) for each in compared]
    console().print(columns(heads, [cells for _, _, cells in sorted(lines)], right=("size", "age")))
    if more:
        console().print(f"[dim]{counted(more, 'earlier version')} without an alias: turret list NAME, or --json[/]")


def _row(version: Version) -> tuple[str, ...]:
    shown = version.as_json()
    splits = (version.metrics.get(split) or {} for split in ("test", "validation"))
    kind = version.part("task").get("kind")
    best = next(((name, values[name]) for values in splits if (name := main_metric(values, kind))), None)
    return (
        f"[bold]{safe(version)}[/]",
        f"[green]{safe(' '.join(version.aliases))}[/]",
        safe(shown["method"] or "?"),
        safe(shown["base"] or "?"),
        f"[dim]{best[0]}[/] {number(best[1])}" if best else "",
        size(version.bytes),
        age(version.created),
    )


def _folded(compared: Compared) -> tuple[str, ...]:
    return (
        f"[dim]{safe(compared)}[/]",
        "",
        safe(", ".join(compared.methods)),
        safe(compared.versions[0].part("base").get("id") or "?"),
        f"[dim]{counted(len(compared.versions), 'training')} of a comparison[/]",
        size(compared.bytes),
        age(compared.created),
    )


def _print_show(shown: JsonMapping) -> None:
    aliases = " ".join(shown["aliases"])
    console().print(f"[bold]{safe(shown['version'])}[/]  [green]{safe(aliases)}[/]  [dim]{safe(shown['digest'])}[/]")
    console().print(grid(_facts(shown)))
    for split, values in shown["metrics"].items():
        classes = values.get("per_class") or {}
        if classes:
            console().print(f"\n[dim]{safe(split)}, by class[/]")
            console().print(_report(classes))
    files = [(f"  {safe(path)}", size(file["bytes"]), file["digest"][:19]) for path, file in shown["files"].items()]
    console().print()
    console().print(columns(("files", "size", "digest"), files, right=("size",)))


def _print_recipe(shown: JsonMapping, as_json: bool) -> None:
    found = part(shown["manifest"], "lineage").get("recipe")
    if not isinstance(found, str):
        raise NotFound(f"{shown['version']} has no recipe: it was not trained here; see `turret show` without --recipe")
    if as_json:
        emit({"version": shown["version"], "recipe": found})
    else:
        for line in found.splitlines():
            console().print(safe(line))


def _facts(shown: JsonMapping) -> Iterator[tuple[str, str]]:
    from turret.methods import said

    manifest = shown["manifest"]
    base, method, task, lineage = (part(manifest, key) for key in ("base", "method", "task", "lineage"))
    by = f" by {safe(shown['who'])}" if shown["who"] else ""
    yield "created", f"{to_minute(shown['created'])}, {age(shown['created'])} ago{by}"
    revision = f"  [dim]revision[/] {safe(str(base['revision'])[:12])}" if base.get("revision") else ""
    yield "base", f"{safe(base.get('id'))}  [dim]{safe(str(base.get('fingerprint'))[:19])}[/]{revision}"
    kind, settings = said(method)
    yield "method", safe(" ".join([kind, *(f"{key}={value}" for key, value in settings.items())]))
    yield "task", safe(f"{task.get('kind')}  {', '.join(map(str, task.get('labels') or ()))}")
    for question, fitted in stored_by_question(task.get("calibration")).items():
        yield "calibration", safe((f"{question}: " if question else "") + _calibration(fitted))
    if shown["promise"]:
        yield "promise", f"{safe(_promise(shown['promise']))}  [dim]turret promise {safe(shown['version'])}[/]"
    for split, values in shown["metrics"].items():
        yield safe(split), measured(split, values)
    yield "size", size(shown["bytes"])
    yield from _lineage(lineage)
    if shown["comparison"]:
        yield "comparison", f"{safe(shown['comparison'])}  [dim]{_KEEP.format(safe(shown['version']))}[/]"
    if shown["run"]:
        yield "run", f"{safe(shown['run']['id'])}  [dim]recipe and curve are in runs/[/]"
    for replay in shown["replays"]:
        yield "golden", _golden(replay)
    if (earlier := len(shown["alias_history"]) - MOVES) > 0:
        yield "moves", f"[dim]{earlier} earlier ones: --json[/]"
    for move in shown["alias_history"][-MOVES:]:
        where = f"{move['alias']} to {move['version']}" if move["version"] else f"{move['alias']} removed"
        gone = ", deleted later" if move["deleted"] else ""
        by = f" by {move['who']}" if move["who"] else ""
        yield safe(move["verb"] or "moved"), safe(f"{where}{gone}, {to_minute(move['moved'])}{by}")


def _promise(kept: JsonMapping) -> str:
    """`error at most 2%, at 95% confidence: decides from 0.93 on`."""
    bound = f"{kept['metric']} at most {100 * kept['error']:g}%, at {100 * kept['confidence']:g}% confidence"
    return f"{bound}: decides from {kept['threshold']:.3g} on{', broken' if kept['broken'] else ''}"


def _calibration(fitted: JsonMapping) -> str:
    """`temperature 1.42, from 200 validation examples`."""
    chose = ", which also chose the weights" if fitted.get("chose_weights") else ""
    return f"temperature {number(fitted.get('temperature'))}, from {fitted.get('examples')} validation examples{chose}"


def _lineage(lineage: JsonMapping) -> Iterator[tuple[str, str]]:
    """What the version was made from, as far as known."""
    for name in ("parent", "data", "tokenizer"):
        if lineage.get(name):
            yield name, safe(str(lineage[name])[:19])
    flat = lineage.get("flat_loss")
    if isinstance(flat, Mapping):
        loss, guessing = (number(flat.get(name)) for name in ("loss", "guessing"))
        yield "warning", f"[yellow]nothing was learnt[/]: training loss {loss}, loss of guessing {guessing}"
    if "seed" in lineage:
        yield "seed", safe(lineage["seed"])
    libraries = lineage.get("libraries")
    if isinstance(libraries, Mapping):
        yield "made with", safe(", ".join(f"{name} {version}" for name, version in sorted(libraries.items())))
    if lineage.get("imported"):
        yield "imported", "[dim]not trained here; digests of its files: --json[/]"
    if lineage.get("recipe"):
        lines = len(str(lineage["recipe"]).splitlines())
        yield "recipe", f"[dim]{lines} lines: turret show REF --recipe[/]"


def _golden(replay: JsonMapping) -> str:
    first = replay["first"]
    failed = f", first failed: example {first['example']}" if first else ""
    name = replay["golden"].removeprefix("sha256:")[:12]
    result = f"{replay['passed']} of {replay['total']} passed{failed}, {to_minute(replay['replayed'])}"
    return safe(f"{name}  {result}")


def _report(classes: Mapping[str, JsonMapping]) -> Table:
    names = ("precision", "recall", "f1", "support")
    rows = [(f"  {safe(label)}", *(number(row.get(name)) for name in names)) for label, row in classes.items()]
    return columns(("class", *names), rows, right=names)
