"""`turret list` and `turret show`: what the store holds. Decode, call, encode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turret.cli import options
from turret.cli.output import columns, console, emit, grid, metrics, number, safe, size, span

if TYPE_CHECKING:
    from turret.store import Version

MOVES = 12  # of the aliases, the last ones, that people are shown
CHIEF = ("accuracy", "rougeL", "loss")  # the first of these is what one column has room for


def list_(
    name: Annotated[str | None, typer.Argument(help="Only this adapter.", show_default=False)] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """List adapters, versions, aliases and metrics."""
    from turret.workspace import Workspace

    found = Workspace(store).list(name)
    if as_json:
        emit({"store": str(store), "versions": [version.as_json() for version in found]})
    else:
        _print_list(found, str(store))


def show(
    reference: Annotated[str, typer.Argument(metavar="REF", help="name, name@3 or name@production")],
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Show all that is known of one version."""
    from turret.workspace import Workspace

    shown = Workspace(store).show(reference)
    if as_json:
        emit(shown)
    else:
        _print_show(shown)


def chief(measured: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The one metric to show where there is room for one: of the test split, where there is one."""
    for split in ("test", "validation"):
        values = measured.get(split) or {}
        for name in CHIEF:
            if name in values:
                return name, values[name]
    return None


def age(created: str) -> str:
    """How long ago that was."""
    passed = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    return span(passed) if passed < 86400 * 2 else f"{passed / 86400:.0f} days"


def _print_list(found: Sequence[Version], store: str) -> None:
    if not found:
        console().print(f"nothing stored in {safe(store)} yet: [bold]turret train reviews.csv[/] makes a first version")
        return
    heads = ("version", "alias", "method", "base", "metric", "size", "age")
    console().print(columns(heads, (_row(version) for version in found), right=("size", "age")))


def _row(version: Version) -> tuple[str, ...]:
    said, best = version.as_json(), chief(version.metrics)
    return (
        f"[bold]{safe(version)}[/]",
        f"[green]{safe(' '.join(version.aliases))}[/]",
        safe(said["method"] or "?"),
        safe(said["base"] or "?"),
        f"[dim]{best[0]}[/] {number(best[1])}" if best else "",
        size(version.bytes),
        age(version.created),
    )


def _print_show(shown: Mapping[str, Any]) -> None:
    aliases = " ".join(shown["aliases"])
    console().print(f"[bold]{safe(shown['version'])}[/]  [green]{safe(aliases)}[/]  [dim]{safe(shown['digest'])}[/]")
    console().print(grid(_facts(shown)))
    for split, values in shown["metrics"].items():
        classes = values.get("per_class") or {}
        if classes:
            console().print(f"\n[dim]{safe(split)}, a class a line[/]")
            console().print(_report(classes))
    files = [(f"  {safe(path)}", size(file["bytes"]), file["digest"][:19]) for path, file in shown["files"].items()]
    console().print("\n", columns(("files", "size", "digest"), files, right=("size",)), sep="")


def _facts(shown: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    manifest = shown["manifest"]
    base, method, task, lineage = (_part(manifest, key) for key in ("base", "method", "task", "lineage"))
    by = f" by {safe(shown['who'])}" if shown["who"] else ""
    yield "created", f"{shown['created'][:16].replace('T', ' ')} UTC, {age(shown['created'])} ago{by}"
    revision = f"  [dim]revision[/] {safe(str(base['revision'])[:12])}" if base.get("revision") else ""
    yield "base", f"{safe(base.get('id'))}  [dim]{safe(str(base.get('fingerprint'))[:19])}[/]{revision}"
    settings = dict(_short(method))
    yield "method", safe(" ".join([str(settings.pop("kind", "?")), *(f"{k}={v}" for k, v in settings.items())]))
    yield "task", safe(f"{task.get('kind')}  {', '.join(map(str, task.get('labels') or ()))}")
    for split, values in shown["metrics"].items():
        yield safe(split), metrics(values)
    yield "size", size(shown["bytes"])
    yield from _lineage(lineage)
    if shown["run"]:
        yield "run", f"{safe(shown['run']['id'])}  [dim]its recipe and curve are in runs/[/]"
    for replay in shown["replays"]:
        yield "golden", _golden(replay)
    if (earlier := len(shown["alias_history"]) - MOVES) > 0:
        yield "moves", f"[dim]{earlier} earlier ones are in --json[/]"
    for move in shown["alias_history"][-MOVES:]:
        where = f"{move['alias']} to {move['version']}" if move["version"] else f"{move['alias']} taken away"
        gone = ", deleted since" if move["deleted"] else ""
        by = f" by {move['who']}" if move["who"] else ""
        yield safe(move["verb"] or "moved"), safe(f"{where}{gone}, {move['moved'][:16].replace('T', ' ')} UTC{by}")


def _part(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = manifest.get(key)
    return found if isinstance(found, Mapping) else {}


def _lineage(lineage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What it was made from, each where it is known."""
    for name in ("parent", "data", "tokenizer"):
        if lineage.get(name):
            yield name, safe(str(lineage[name])[:19])
    if "seed" in lineage:
        yield "seed", safe(lineage["seed"])
    libraries = lineage.get("libraries")
    if isinstance(libraries, Mapping):
        yield "made with", safe(", ".join(f"{name} {version}" for name, version in sorted(libraries.items())))
    if lineage.get("imported"):
        yield "imported", "[dim]from outside; its files' digests are in --json[/]"
    if lineage.get("recipe"):
        lines = len(str(lineage["recipe"]).splitlines())
        yield "recipe", f"[dim]{lines} lines, in --json; `turret diff` compares it key by key[/]"


def _golden(replay: Mapping[str, Any]) -> str:
    first = replay["first"]
    failed = f", first failed: example {first['example']}" if first else ""
    name = replay["golden"].removeprefix("sha256:")[:12]
    said = f"{replay['passed']} of {replay['total']} passed{failed}, {replay['replayed'][:16].replace('T', ' ')} UTC"
    return safe(f"{name}  {said}")


def _short(method: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that say something: not what is off, usual, or left to the family."""
    for key, value in method.items():
        usual = value is None or value is False or (key == "init_lora_weights" and value is True)
        if usual or (isinstance(value, (list, tuple)) and len(value) > 4):
            continue
        yield key, ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _report(classes: Mapping[str, Mapping[str, Any]]) -> Any:
    names = ("precision", "recall", "f1", "support")
    rows = [(f"  {safe(label)}", *(number(row.get(name)) for name in names)) for label, row in classes.items()]
    return columns(("class", *names), rows, right=names)
