"""`turret doctor`: show what this machine can run."""

from __future__ import annotations

from collections.abc import Iterator

from turret.cli import options
from turret.cli.output import console, counted, emit, grid, safe, size
from turret.json_types import JsonMapping

GOOD, BAD = "[green]ok[/]  ", "[yellow]--[/]  "


def doctor(store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """Show what this machine can run: processor, libraries, bundled bases and data, and the store."""
    from turret.workspace import Workspace

    facts = Workspace(store).doctor()
    if as_json:
        emit(facts)
    else:
        console().print(grid(_lines(facts)))


def _lines(facts: JsonMapping) -> Iterator[tuple[str, str]]:
    yield "turret", f"{facts['turret']}  [dim]python {facts['python']}, {safe(facts['system'])}[/]"
    memory = f"{size(facts['memory_bytes'])} memory, {size(facts['memory_available_bytes'])} of it free"
    yield "machine", f"{facts['cores']} cores, {memory}, {size(facts['disk_free_bytes'])} free on disk"
    yield "processor", _processor(facts["processor"])
    if "device" in facts["processor"]:
        yield "device", f"{facts['processor']['device']}  [dim]{safe(facts['processor']['device_reason'])}[/]"
    if "float32_products" in facts["processor"]:
        yield "float32", safe(facts["processor"]["float32_products"])
    if "kernels" in facts["processor"]:
        yield "kernels", _kernels(facts["processor"]["kernels"], facts["processor"]["int8"])
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


def _processor(processor: JsonMapping) -> str:
    if "problem" in processor:
        return f"[red]{safe(processor['problem'])}[/]"
    gpu = safe(processor["gpu"]) if processor["gpu"] else "no GPU"
    dtype = f", bases in {processor['dtype']}" if "dtype" in processor else ""
    return f"{processor['instructions']}, {processor['threads']} threads, {gpu}{dtype}"


def _kernels(text: str, int8: bool) -> str:
    if not text.startswith(("compiled", "shipped")):
        return f"{BAD}{safe(text)}; training is slower without them"
    products = "; 8-bit products for train.int8" if int8 else ""
    if text.startswith("compiled as"):
        return f"{GOOD}compiled for this processor{products}"
    return f"{GOOD if text.startswith('shipped') else BAD}{safe(text)}{products}"


def _store(store: JsonMapping) -> str:
    if store["problems"]:
        return f"{BAD}{safe(store['path'])}"
    if not store["exists"]:
        return f"{safe(store['path'])}  [dim]does not exist yet; `turret train` makes it[/]"
    writable = "" if store["writable"] else ", read-only"
    return f"{GOOD}{safe(store['path'])}, {counted(store['versions'], 'version')}{writable}"
