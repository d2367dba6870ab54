"""`turret verify`, `gc` and `delete`: is everything whole, and what may go. Decode, call, encode."""

from __future__ import annotations

from typing import Annotated

import typer

from turret.cli import options
from turret.cli.output import console, counted, emit, rows, safe, size


def verify(
    reference: Annotated[str | None, typer.Argument(metavar="[REF]", help="Only this.", show_default=False)] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Hash and open everything again.

    A line a problem; exit status 1 where there is one. Files that no version lists are counted, and no problem.
    """
    from turret.workspace import Workspace

    found = Workspace(store).verify(reference)
    if as_json:
        emit({"store": str(store), **found.as_json()})
    else:
        for problem in found.problems:
            console().print(f"[red]{safe(problem.where)}[/] {safe(problem.path or '')}: {safe(problem.problem)}")
        said = "[green]all whole[/]" if found.ok else f"[red]broken: {len(found.problems)}[/]"
        versions, files = counted(found.versions, "version"), counted(found.files, "file")
        console().print(f"{said}: {versions}, {files}, {size(found.bytes)} hashed")
        if found.orphans:
            loose = f"{counted(found.orphans, 'file')} ({size(found.orphan_bytes)})"
            console().print(f"[dim]{loose} no version lists: turret gc[/]")
    if not found.ok:
        raise typer.Exit(1)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Remove what nothing refers to; safe beside everything else."""
    from turret.workspace import Workspace

    done = Workspace(store).gc(dry_run=dry_run)
    if as_json:
        emit({"store": str(store), **done.as_json()})
        return
    if done.removed:
        console().print(rows((size(each.bytes), safe(each.path), f"[dim]{each.why}[/]") for each in done.removed))
    verb = "would go" if dry_run else "removed"
    console().print(f"{len(done.removed)} {verb}, {size(done.bytes)}" if done.removed else "nothing to remove")


def delete(
    reference: Annotated[str, typer.Argument(metavar="REF", help="name@3 or name@candidate")],
    force: Annotated[bool, typer.Option("--force", help="Also what an alias or another version needs.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Take a version out of the catalog.

    Its number is never given again; its files go with the next gc.
    """
    from turret.workspace import Workspace

    gone = Workspace(store).delete(reference, force=force)
    if as_json:
        emit(gone.as_json())
        return
    taken = f"; taken away: {', '.join(gone.aliases)}" if gone.aliases else ""
    console().print(f"deleted [bold]{safe(gone.version)}[/] ({size(gone.bytes)}; turret gc frees them){safe(taken)}")
