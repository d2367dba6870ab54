"""`turret verify`, `gc` and `delete`: check the store, and remove what is not needed."""

from __future__ import annotations

from typing import Annotated

import typer

from turret.access import DEFAULT, Access
from turret.cli import options
from turret.cli.output import console, emit, rows, safe, size
from turret.errors import counted


def verify(
    reference: Annotated[str | None, typer.Argument(metavar="[REF]", help="A version.", show_default=False)] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Hash and open all stored files again: of the tenant, or as `default` of every tenant.

    Prints a line per problem, with exit status 1. Files that no version lists are only counted.
    """
    from turret.workspace import Workspace

    workspace = Workspace(store)
    found = workspace.verify(reference)
    if reference is None and workspace.store.access.operates:
        for tenant in workspace.store.tenants():
            if tenant != DEFAULT:
                found = found.and_of(tenant, workspace.with_access(Access(tenant)).verify())
    if as_json:
        emit({"store": str(store), **found.as_json()})
    else:
        for problem in found.problems:
            console().print(f"[red]{safe(problem.where)}[/] {safe(problem.path or '')}: {safe(problem.problem)}")
        result = "[green]no problem[/]" if found.ok else f"[red]broken: {len(found.problems)}[/]"
        versions, files = counted(found.versions, "version"), counted(found.files, "file")
        console().print(f"{result}: {versions}, {files}, {size(found.bytes)} hashed")
        if found.orphans:
            orphans = f"{counted(found.orphans, 'file')} ({size(found.orphan_bytes)})"
            console().print(f"[dim]{orphans} that no version lists: turret gc removes them[/]")
    if not found.ok:
        raise typer.Exit(1)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Remove files that nothing refers to. Safe while other processes use the store."""
    from turret.workspace import Workspace

    done = Workspace(store).gc(dry_run=dry_run)
    if as_json:
        emit({"store": str(store), **done.as_json()})
        return
    if done.removed:
        console().print(rows((size(each.bytes), safe(each.path), f"[dim]{each.why}[/]") for each in done.removed))
    verb = "would be removed" if dry_run else "removed"
    console().print(f"{len(done.removed)} {verb}, {size(done.bytes)}" if done.removed else "nothing to remove")


def delete(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A version: name@3 or name@candidate.")],
    force: Annotated[bool, typer.Option("--force", help="Delete even if an alias or a version needs it.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Delete a version.

    Its number is never used again. The next gc removes its files.
    """
    from turret.workspace import Workspace

    deleted = Workspace(store).delete(reference, force=force)
    if as_json:
        emit(deleted.as_json())
        return
    removed = f"; removed aliases: {', '.join(deleted.aliases)}" if deleted.aliases else ""
    freed = f"{size(deleted.bytes)}; turret gc frees them"
    console().print(f"deleted [bold]{safe(deleted.version)}[/] ({freed}){safe(removed)}")
