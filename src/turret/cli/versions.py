"""The versions in the store: list, show and compare them, move their aliases, set gates, and delete them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from turret.amounts import many, size, span
from turret.cli import options
from turret.cli.output import class_table, columns, console, cut, emit, grid, number, safe, split_metrics
from turret.cli.train import predict_command
from turret.errors import NotFound, count_of
from turret.json_types import JsonObject, Plain
from turret.manifest import Lineage, base_in, lineage_in, method_in, task_in
from turret.tasks import main_metric
from turret.tasks.calibration import stored_by_question
from turret.tasks.shapes import parts_in
from turret.timestamp import to_minute

if TYPE_CHECKING:
    from turret.store import Compared, Deleted, Gate, GateStatus, Golden, Move, Version
    from turret.store.core import VersionFacts
    from turret.store.difference import Difference
    from turret.tasks.shapes import CalibrationSpec


# --- diff -------------------------------------------------------------------------------------------------------------


def diff(
    first: Annotated[str, Argument(metavar="A", help="A version: name, name@3 or name@production.")],
    second: Annotated[str, Argument(metavar="B", help="Another version, of any name.")],
    command: options.Command,
) -> None:
    """Show the differences between two versions: settings, metrics, sizes and weights."""
    command.report(command.workspace.diff(first, second), _print_diff)


def _print_diff(found: Difference) -> None:
    a, b = (f"{safe(each)}" for each in found.versions)
    sides = [(f"  {safe(key)}", _value(left), _value(right)) for key, (left, right) in found.differs.items()]
    sides.append(("  size", size(found.bytes[0]), size(found.bytes[1])))
    console().print(columns(("differs", a, b), sides))
    measured = list(_metric_rows(found))
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


def _metric_rows(found: Difference) -> Iterator[tuple[str, ...]]:
    for split, values in found.metrics.items():
        for name, (left, right, more) in values.items():
            if "." not in name:  # --json has the metrics of each class
                change = "" if more is None else f"+{number(more)}" if more > 0 else number(more)
                yield f"  {safe(split)} {safe(name)}", number(left), number(right), change


def _value(value: Plain) -> str:
    if value is None:
        return "[dim]-[/]"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = text[:19] if text.startswith("sha256:") else text
    return safe(cut(text, 60))


def _share(distance: float | None) -> str:
    return "from zero" if distance is None else "0" if distance == 0 else f"{distance:.3g}"


# --- list, show, delete -----------------------------------------------------------------------------------------------


FEW = 40  # of more versions, `list` shows the newest of each name and those with an alias
MOVES = 12  # of the aliases, the newest ones
_KEEP = "the plain name does not mean it: turret promote {} production keeps it"


def list_(
    *,
    name: Annotated[str | None, Argument(help="Only this adapter.", show_default=False)] = None,
    every: Annotated[bool, Option("--all", help="A line for each version of a comparison too.")] = False,
    command: options.Command,
) -> None:
    """List adapters, versions, aliases and metrics.

    The trainings of a comparison are one line: a plain name never means them. `promote NAME@N production` keeps one.
    """
    from turret.store import fold_comparisons

    found = command.workspace.list(name)
    if command.as_json:
        emit({"store": str(command.store), "versions": [version.as_json() for version in found]})
        return
    own, compared = (found, []) if every else fold_comparisons(found)
    shown = own if name or every else choose_versions(own)
    _print_list(shown, compared, len(own) - len(shown), f"{f'{name} in ' if name else ''}{command.store}")


def show(
    *,
    reference: options.Ref,
    recipe: Annotated[bool, Option(help="Print only its recipe, which `turret train` accepts.")] = False,
    command: options.Command,
) -> None:
    """Show one version: settings, metrics, lineage, files, and the moves of its aliases."""
    shown = command.workspace.show(reference)
    if recipe:
        _print_recipe(shown, command.as_json)
    elif command.as_json:
        emit(shown)
    else:
        _print_show(shown)


def delete(
    *,
    reference: Annotated[str, Argument(metavar="REF", help="A version: name@3 or name@candidate.")],
    force: Annotated[bool, Option(help="Delete even if an alias or a version needs it.")] = False,
    command: options.Command,
) -> None:
    """Delete a version.

    Its number is never used again. The next gc removes its files.
    """
    command.report(command.workspace.delete(reference, force=force), _print_deleted)


def _print_deleted(deleted: Deleted) -> None:
    removed = f"; removed aliases: {', '.join(deleted.aliases)}" if deleted.aliases else ""
    freed = f"{size(deleted.bytes)}; turret gc frees them"
    console().print(f"deleted [bold]{safe(deleted.version)}[/] ({freed}){safe(removed)}")


def choose_versions(found: Sequence[Version]) -> Sequence[Version]:
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
    lines += [(each.name, each.versions[0].number, _comparison_row(each)) for each in compared]
    console().print(columns(heads, [cells for _, _, cells in sorted(lines)], right=("size", "age")))
    if more:
        console().print(f"[dim]{count_of(more, 'earlier version')} without an alias: turret list NAME, or --json[/]")


def _row(version: Version) -> tuple[str, ...]:
    shown = version.as_json()
    splits = (version.metrics.get(split) or {} for split in ("test", "validation"))
    kind = version.task.get("kind")
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


def _comparison_row(compared: Compared) -> tuple[str, ...]:
    return (
        f"[dim]{safe(compared)}[/]",
        "",
        safe(", ".join(compared.methods)),
        safe(compared.versions[0].base.get("id") or "?"),
        f"[dim]{count_of(len(compared.versions), 'training')} of a comparison[/]",
        size(compared.bytes),
        age(compared.created),
    )


def _print_show(shown: VersionFacts) -> None:
    aliases = " ".join(shown["aliases"])
    console().print(f"[bold]{safe(shown['version'])}[/]  [green]{safe(aliases)}[/]  [dim]{safe(shown['digest'])}[/]")
    console().print(grid(_facts(shown)))
    for split, values in shown["metrics"].items():
        classes = parts_in(values, "per_class")
        if classes:
            console().print(f"\n[dim]{safe(split)}, by class[/]")
            console().print(class_table(classes))
    files = [(f"  {safe(path)}", size(file["bytes"]), file["digest"][:19]) for path, file in shown["files"].items()]
    console().print()
    console().print(columns(("files", "size", "digest"), files, right=("size",)))


def _print_recipe(shown: VersionFacts, as_json: bool) -> None:
    found = lineage_in(shown["manifest"]).get("recipe")
    if not isinstance(found, str):
        raise NotFound(f"{shown['version']} has no recipe: it was not trained here; see `turret show` without --recipe")
    if as_json:
        emit({"version": shown["version"], "recipe": found})
    else:
        for line in found.splitlines():
            console().print(safe(line))


def _facts(shown: VersionFacts) -> Iterator[tuple[str, str]]:
    from turret.methods import describe_method

    manifest = shown["manifest"]
    base, task, lineage = base_in(manifest), task_in(manifest), lineage_in(manifest)
    by = f" by {safe(shown['who'])}" if shown["who"] else ""
    yield "created", f"{to_minute(shown['created'])}, {age(shown['created'])} ago{by}"
    revision = f"  [dim]revision[/] {safe(str(base['revision'])[:12])}" if base.get("revision") else ""
    yield "base", f"{safe(base.get('id'))}  [dim]{safe(str(base.get('fingerprint'))[:19])}[/]{revision}"
    kind, settings = describe_method(method_in(manifest))
    yield "method", safe(" ".join([kind, *(f"{key}={value}" for key, value in settings.items())]))
    yield "task", safe(f"{task.get('kind')}  {', '.join(map(str, task.get('labels') or ()))}")
    for question, fitted in stored_by_question(task.get("calibration")).items():
        yield "calibration", safe((f"{question}: " if question else "") + _calibration(fitted))
    if (kept := shown["promise"]) is not None:
        bound = f"{kept['metric']} at most {100 * kept['error']:g}%, at {100 * kept['confidence']:g}% confidence"
        said = safe(f"{bound}: decides from {kept['threshold']:.3g} on{', broken' if kept['broken'] else ''}")
        yield "promise", f"{said}  [dim]turret promise {safe(shown['version'])}[/]"
    for split, values in shown["metrics"].items():
        yield safe(split), split_metrics(split, values)
    yield "size", size(shown["bytes"])
    yield from _lineage(lineage)
    if shown["comparison"]:
        yield "comparison", f"{safe(shown['comparison'])}  [dim]{_KEEP.format(safe(shown['version']))}[/]"
    if shown["run"]:
        yield "run", f"{safe(shown['run']['id'])}  [dim]recipe and curve are in runs/[/]"
    for replay in shown["replays"]:
        failed = f", first failed: example {replay['first']['example']}" if replay["first"] else ""
        result = f"{replay['passed']} of {replay['total']} passed{failed}, {to_minute(replay['replayed'])}"
        yield "golden", safe(f"{replay['golden'].removeprefix('sha256:')[:12]}  {result}")
    if (earlier := len(shown["alias_history"]) - MOVES) > 0:
        yield "moves", f"[dim]{earlier} earlier ones: --json[/]"
    for move in shown["alias_history"][-MOVES:]:
        where = f"{move['alias']} to {move['version']}" if move["version"] else f"{move['alias']} removed"
        gone = ", deleted later" if move["deleted"] else ""
        by = f" by {move['who']}" if move["who"] else ""
        yield safe(move["verb"] or "moved"), safe(f"{where}{gone}, {to_minute(move['moved'])}{by}")


def _calibration(fitted: CalibrationSpec) -> str:
    """`temperature 1.42, from 200 validation examples`."""
    chose = ", which also chose the weights" if fitted.get("chose_weights") else ""
    return f"temperature {number(fitted.get('temperature'))}, from {fitted.get('examples')} validation examples{chose}"


def _lineage(lineage: Lineage) -> Iterator[tuple[str, str]]:
    """What the version was made from, as far as known."""
    for name in ("parent", "data", "tokenizer"):
        if lineage.get(name):
            yield name, safe(str(lineage[name])[:19])
    flat = lineage.get("flat_loss")
    if isinstance(flat, Mapping):
        loss, guessing = number(flat.get("loss")), number(flat.get("guessing"))
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


# --- aliases ----------------------------------------------------------------------------------------------------------


PRODUCTION = "production"
Alias = Annotated[str, Argument(help="An alias such as production or candidate.")]


def promote(
    *,
    reference: Annotated[str, Argument(metavar="REF", help="A version: name, name@3 or name@candidate.")],
    alias: Alias,
    require: Annotated[
        list[str] | None, Option(metavar="GATE", help="A gate for this promote only, METRIC>=NUMBER; repeatable.")
    ] = None,
    replay: Annotated[bool, Option(help="Ask golden examples again that the version has answered before.")] = False,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Move an alias to a version.

    The version's files are hashed first. Its metrics must pass the alias's gates, and its answers the golden examples.
    """
    move = command.perform(
        _print_move, command.workspace.promote, reference, alias, require=require or (), replay=replay, device=device
    )
    if move.changed:
        asked = move.name if alias == PRODUCTION else f"{move.name}@{alias}"
        task = command.workspace.resolve(move.version).task
        command.offer(predict_command(asked, task), f"rollback {move.name} {alias}")


def rollback(
    *,
    name: Annotated[str, Argument(help="Name of the adapter.", show_default=False)],
    alias: Alias = PRODUCTION,
    command: options.Command,
) -> None:
    """Move an alias back to the version that it named before.

    Another rollback goes one move further back. A promote starts a new history from there.
    """
    command.report(command.workspace.rollback(name, alias), _print_move)


def gate(
    *,
    name: Annotated[str, Argument(help="Name of the adapter.", show_default=False)],
    alias: Annotated[str | None, Argument(help="Only this alias.", show_default=False)] = None,
    add: Annotated[
        list[str] | None, Argument(metavar="GATE", help="A gate: METRIC>=NUMBER or METRIC<=NUMBER.", show_default=False)
    ] = None,
    remove: Annotated[
        list[str] | None, Option(metavar="GATE", help="A gate, or all gates of a metric; repeatable.")
    ] = None,
    golden: Annotated[Path | None, Option(metavar="FILE", help="A table of texts and the expected answers.")] = None,
    share: Annotated[
        float | None, Option(help="The share of golden examples that must pass, such as 0.95; default: all.")
    ] = None,
    command: options.Command,
) -> None:
    """Show, add or remove the gates of an alias, and show whether its current version passes them."""
    workspace = command.workspace
    workspace.gate(name, alias, add=add or (), remove=remove or (), golden=golden, share=share)
    found = workspace.gate_status(name, alias)
    rows = (
        (
            f"[green]{safe(name)}@{safe(each.gate.alias)}[/]",
            safe(each.gate),
            _examples(each.gate),
            _result(each),
        )
        for each in found
    )
    none = f"no gate on {safe(f'{name}@{alias}' if alias else name)}"
    value: JsonObject = {"name": name, "gates": [each.as_json() for each in found]}
    command.table(value, ("alias", "gate", "", "version"), rows, none=none)


def _examples(gate: Gate | Golden) -> str:
    count = getattr(gate, "examples", None)
    return "" if count is None else f"[dim]{many(count)} golden example{'' if count == 1 else 's'}[/]"


def _result(each: GateStatus) -> str:
    """`news@2 passes, found 0.93`."""
    if each.holder is None:
        return f"[dim]{safe(each.found)}[/]"
    result = {True: "[green]passes[/]", False: "[red]fails[/]", None: "[yellow]unknown[/]"}[each.passes]
    return f"{safe(each.holder)} {result}, {safe(each.found)}"


def _print_move(move: Move) -> None:
    alias, version = (
        f"[green]{safe(move.name)}@{safe(move.alias)}[/]",
        f"[bold]{safe(move.version)}[/]",
    )
    if not move.changed:
        console().print(f"{alias} names {version} already: nothing moved{_passed_replays(move)}")
        return
    before = safe(move.before or "nothing")
    skipped = f" [dim](skipped, because deleted: {safe(', '.join(move.skipped))})[/]" if move.skipped else ""
    console().print(f"{alias} names {version} now; it named {before} before{skipped}{_passed_replays(move)}")


def _passed_replays(move: Move) -> str:
    return "".join(
        f"\n[dim]{safe(replay)} golden examples passed, {safe(to_minute(replay.replayed))}[/]"
        for replay in move.replays
    )
