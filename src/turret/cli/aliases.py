"""`turret promote`, `rollback` and `gate`: move an alias, and set what a version must pass to take it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.output import columns, console, emit, many, offer, report, safe, status
from turret.timestamp import to_minute

if TYPE_CHECKING:
    from turret.store import Gate, GateStatus, Golden, Move

PRODUCTION = "production"
Alias = Annotated[str, typer.Argument(help="An alias such as production or candidate.")]
Require = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="GATE", help="A gate for this promote only, METRIC>=NUMBER; repeatable."),
]


def promote(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A version: name, name@3 or name@candidate.")],
    alias: Alias,
    require: Require = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Ask golden examples again that the version has answered before.")
    ] = False,
    device: options.Device = "auto",
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Move an alias to a version.

    The version's files are hashed first. Its metrics must pass the alias's gates, and its answers the golden examples.
    """
    from turret.workspace import Workspace

    with status() as say:
        workspace = Workspace(store)
        move = workspace.promote(reference, alias, require=require or (), replay=replay, device=device, on_stage=say)
    report(move, as_json, _print)
    if move.changed and not as_json:
        asked = move.name if alias == PRODUCTION else f"{move.name}@{alias}"
        offer([f'predict {asked} "a text of your own"', f"rollback {move.name} {alias}"], store)


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)],
    alias: Alias = PRODUCTION,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Move an alias back to the version that it named before.

    Another rollback goes one move further back. A promote starts a new history from there.
    """
    from turret.workspace import Workspace

    report(Workspace(store).rollback(name, alias), as_json, _print)


def gate(
    name: Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)],
    alias: Annotated[str | None, typer.Argument(help="Only this alias.", show_default=False)] = None,
    add: Annotated[
        list[str] | None,
        typer.Argument(metavar="GATE", help="A gate: METRIC>=NUMBER or METRIC<=NUMBER.", show_default=False),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="GATE", help="A gate, or all gates of a metric; repeatable.")
    ] = None,
    golden: Annotated[
        Path | None, typer.Option("--golden", metavar="FILE", help="A table of texts and the expected answers.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option("--share", help="The share of golden examples that must pass, such as 0.95; default: all."),
    ] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Show, add or remove the gates of an alias, and show whether its current version passes them."""
    from turret.workspace import Workspace

    workspace = Workspace(store)
    workspace.gate(name, alias, add=add or (), remove=remove or (), golden=golden, share=share)
    found = workspace.gate_status(name, alias)
    if as_json:
        emit({"name": name, "gates": [each.as_json() for each in found]})
    elif found:
        rows = [
            (f"[green]{safe(name)}@{safe(each.gate.alias)}[/]", safe(each.gate), _examples(each.gate), _result(each))
            for each in found
        ]
        console().print(columns(("alias", "gate", "", "version"), rows))
    else:
        console().print(f"no gate on {safe(f'{name}@{alias}' if alias else name)}")


def _examples(gate: Gate | Golden) -> str:
    count = getattr(gate, "examples", None)
    return "" if count is None else f"[dim]{many(count)} golden example{'' if count == 1 else 's'}[/]"


def _result(each: GateStatus) -> str:
    """`news@2 passes, found 0.93`."""
    if each.holder is None:
        return f"[dim]{safe(each.found)}[/]"
    result = {True: "[green]passes[/]", False: "[red]fails[/]", None: "[yellow]unknown[/]"}[each.passes]
    return f"{safe(each.holder)} {result}, {safe(each.found)}"


def _print(move: Move) -> None:
    alias, version = f"[green]{safe(move.name)}@{safe(move.alias)}[/]", f"[bold]{safe(move.version)}[/]"
    if not move.changed:
        console().print(f"{alias} names {version} already: nothing moved{_passed(move)}")
        return
    before = safe(move.before or "nothing")
    skipped = f" [dim](skipped, because deleted: {safe(', '.join(move.skipped))})[/]" if move.skipped else ""
    console().print(f"{alias} names {version} now; it named {before} before{skipped}{_passed(move)}")


def _passed(move: Move) -> str:
    return "".join(
        f"\n[dim]{safe(replay)} golden examples passed, {safe(to_minute(replay.replayed))}[/]"
        for replay in move.replays
    )
