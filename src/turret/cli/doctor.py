"""`turret doctor`: what this machine can run, in one screen. Decode, call, encode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from turret.cli import options
from turret.cli.output import console, counted, emit, grid, safe, size

GOOD, BAD = "[green]ok[/]  ", "[yellow]--[/]  "


def doctor(store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """Say what this machine can run."""
    from turret.workspace import Workspace

    facts = Workspace(store).doctor()
    if as_json:
        emit(facts)
    else:
        console().print(grid(_lines(facts)))


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "turret", f"{facts['turret']}  [dim]python {facts['python']}, {safe(facts['system'])}[/]"
    memory = f"{size(facts['memory_bytes'])} memory, {size(facts['memory_available_bytes'])} of it free"
    yield "machine", f"{facts['cores']} cores, {memory}, {size(facts['disk_free_bytes'])} free on disk"
    yield "processor", _processor(facts["processor"])
    if "float32_products" in facts["processor"]:
        yield "float32", safe(facts["processor"]["float32_products"])
    if "kernels" in facts["processor"]:
        yield "kernels", _kernels(facts["processor"]["kernels"], facts["processor"]["int8"])
    for name, version in facts["libraries"].items():
        yield name, GOOD + version if version else f"{BAD}not installed: pip install {name}"
    for thing in facts["bundled"]:
        there = GOOD + f"{thing['kind']}, {thing['installed']}"
        yield thing["source"], there if thing["installed"] else f"{BAD}{thing['kind']}, not here: {thing['install']}"
    yield "hub", f"{facts['hub']}  [dim]bases and data by Hub id need it; files, folders and pypi: do not[/]"
    yield "store", _store(facts["store"])
    for problem in facts["store"]["problems"]:
        yield "", f"[red]{safe(problem)}[/]"


def _processor(processor: Mapping[str, Any]) -> str:
    if "problem" in processor:
        return f"[red]{safe(processor['problem'])}[/]"
    gpu = safe(processor["gpu"]) if processor["gpu"] else "no GPU"
    dtype = f", bases in {processor['dtype']}" if "dtype" in processor else ""
    return f"{processor['instructions']}, {processor['threads']} threads, {gpu}{dtype}"


def _kernels(said: str, int8: bool) -> str:
    if not said.startswith(("compiled", "shipped")):
        return f"{BAD}{safe(said)}; training is slower without them"
    products = "; products in 8 bits for train.int8" if int8 else ""
    if said.startswith("compiled as"):
        return f"{GOOD}compiled for this processor{products}"
    return f"{GOOD if said.startswith('shipped') else BAD}{safe(said)}{products}"


def _store(store: Mapping[str, Any]) -> str:
    if store["problems"]:
        return f"{BAD}{safe(store['path'])}"
    if not store["exists"]:
        return f"{safe(store['path'])}  [dim]not there yet; `turret train` makes it[/]"
    writable = "" if store["writable"] else ", read-only"
    return f"{GOOD}{safe(store['path'])}, {counted(store['versions'], 'version')}{writable}"
