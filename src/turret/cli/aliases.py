"""`turret promote`, `rollback`, `gate`: where an alias points, what it asks of a version. Decode, call, encode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.output import columns, console, emit, many, safe, status

if TYPE_CHECKING:
    from turret.store import Gate, GateStatus, Golden, Move

PRODUCTION = "production"
Alias = Annotated[str, typer.Argument(help="such as production or candidate")]
Wanted = Annotated[
    list[str] | None,
    typer.Option(
        "--require", metavar="GATE", help="Refuse unless its metrics pass, such as accuracy>=0.9; repeatable."
    ),
]


def promote(
    reference: Annotated[str, typer.Argument(metavar="REF", help="name, name@3 or name@candidate")],
    alias: Alias,
    require: Wanted = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Ask golden examples again that it was asked before.")
    ] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Move an alias to a version.

    Its files are hashed first, its metrics must pass the alias's gates and its answers the golden examples.
    """
    from turret.workspace import Workspace

    with status() as say:
        move = Workspace(store).promote(reference, alias, require=require or (), replay=replay, on_stage=say)
    _answer(move, as_json)


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)],
    alias: Alias = PRODUCTION,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Move an alias back to what it named before.

    Again and again walks further back; a promote after that starts a new line.
    """
    from turret.workspace import Workspace

    _answer(Workspace(store).rollback(name, alias), as_json)


def gate(
    name: Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)],
    alias: Annotated[str | None, typer.Argument(help="Only this alias.", show_default=False)] = None,
    add: Annotated[
        list[str] | None, typer.Argument(metavar="GATE", help="such as test.accuracy>=0.9", show_default=False)
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="GATE", help="A gate, or a metric's gates; repeatable.")
    ] = None,
    golden: Annotated[
        Path | None, typer.Option("--golden", metavar="FILE", help="A table of texts and what answers must be.")
    ] = None,
    share: Annotated[
        float | None, typer.Option("--share", help="Of those examples that must pass, such as 0.95; all unless given.")
    ] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Show, add or remove what an alias asks of a version, and say whether its present holder passes."""
    from turret.workspace import Workspace

    workspace = Workspace(store)
    workspace.gate(name, alias, add=add or (), remove=remove or (), golden=golden, share=share)
    found = workspace.standing(name, alias)
    if as_json:
        emit({"name": name, "gates": [each.as_json() for each in found]})
    elif found:
        rows = [
            (f"[green]{safe(name)}@{safe(each.gate.alias)}[/]", safe(each.gate), _much(each.gate), _stands(each))
            for each in found
        ]
        console().print(columns(("alias", "gate", "", "holder"), rows))
    else:
        console().print(f"no gate on {safe(f'{name}@{alias}' if alias else name)}")


def _much(gate: Gate | Golden) -> str:
    """What the words of a gate do not tell."""
    count = getattr(gate, "examples", None)
    return "" if count is None else f"[dim]{many(count)} golden example{'' if count == 1 else 's'}[/]"


def _stands(each: GateStatus) -> str:
    """`news@2 passes, found 0.93`."""
    if each.holder is None:
        return f"[dim]{safe(each.found)}[/]"
    said = {True: "[green]passes[/]", False: "[red]fails[/]", None: "[yellow]not known[/]"}[each.passes]
    return f"{safe(each.holder)} {said}, {safe(each.found)}"


def _answer(move: Move, as_json: bool) -> None:
    if as_json:
        emit(move.as_json())
        return
    alias, version = f"[green]{safe(move.name)}@{safe(move.alias)}[/]", f"[bold]{safe(move.version)}[/]"
    if not move.changed:
        console().print(f"{alias} names {version} already: nothing moved{_passed(move)}")
        return
    was = f"it named {safe(move.before)}" if move.before else "it named nothing"
    passed = f" [dim](passed over, deleted since: {safe(', '.join(move.skipped))})[/]" if move.skipped else ""
    console().print(f"{alias} names {version} now; {was} before{passed}{_passed(move)}")


def _passed(move: Move) -> str:
    return "".join(
        f"\n[dim]{safe(replay)} golden examples passed, {safe(replay.replayed[:16].replace('T', ' '))} UTC[/]"
        for replay in move.replays
    )
