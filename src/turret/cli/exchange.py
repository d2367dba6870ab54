"""`turret import` and `turret export`: adapters from outside, and versions for others. Decode, call, encode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from turret.cli import options
from turret.cli.output import console, emit, grid, many, safe, size, status
from turret.errors import RecipeError

if TYPE_CHECKING:
    from turret.workspace import Exported, Imported

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of a recipe's [task], such as task.prefix_text=..."),
]


def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="PEFT folder, bundle, .zip or .tar.gz, or Hub id.")],
    name: Annotated[str, typer.Option("--name", help="The adapter's name in the store.")],
    base: Annotated[str | None, typer.Option("--base", help="Its base, where it is not the one it names.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="classify, summarize or generate.")] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="A,B,C", help="Names of the head's outputs.")
    ] = None,
    sets: Settings = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Check an adapter from outside on its base, and store it.

    Reads safetensors only, never a pickle. A bundle that turret exported keeps its digest.
    """
    from turret.workspace import Workspace

    named = [label.strip() for label in labels.split(",")] if labels else None
    settings = _settings(sets)
    with status() as say:
        found = Workspace(store).import_adapter(
            source, name, base=base, task=task, labels=named, settings=settings, on_stage=say
        )
    if as_json:
        emit(found.as_json())
    else:
        _print_imported(found)


def export(
    reference: Annotated[str, typer.Argument(metavar="REF", help="name, name@3 or name@production")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that is new or empty.")],
    merged: Annotated[bool, typer.Option("--merged", help="The whole model, the adapter in its weights.")] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="A LoRA that vLLM takes, or say why it does not.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also into a folder that holds something.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Write a stored version as a folder that PEFT loads.

    With a model card; `turret import` of it gives the same version again.
    """
    from turret.workspace import Workspace

    if merged and vllm:
        raise RecipeError("--merged and --vllm are two exports: give one of them")
    form: Literal["peft", "merged", "vllm"] = "merged" if merged else "vllm" if vllm else "peft"
    with status() as say:
        found = Workspace(store).export(reference, folder, form=form, force=force, on_stage=say)
    if as_json:
        emit(found.as_json())
    else:
        _print_exported(found)


def _settings(sets: list[str] | None) -> dict[str, str]:
    found = {}
    for key, value in options.overrides(sets).items():
        if not key.startswith("task."):
            raise RecipeError(f"--set {key}: import knows the keys of [task], such as task.prefix_text")
        found[key.removeprefix("task.")] = value
    return found


def _print_imported(found: Imported) -> None:
    console().print(f"[bold]{safe(found.version)}[/]  [dim]{safe(found.digest)}[/]")
    labels = ", ".join(found.task["labels"])
    rows = [
        ("base", f"{safe(found.base['id'])}  [dim]{safe(found.base['fingerprint'][:19])}[/]"),
        ("method", f"{safe(found.method)}, {many(found.parameters)} parameters in {found.tensors} tensors"),
        ("task", safe(f"{found.task['kind']}  {labels}")),
        ("checked", f"all tensors are used; outputs move by {found.effect:.2g} of the largest"),
        ("size", size(found.bundle_bytes)),
    ]
    console().print(grid(rows + [("note", safe(note)) for note in found.notes]))


def _print_exported(found: Exported) -> None:
    words = {"peft": "a bundle, which PEFT loads", "merged": "a whole model", "vllm": "a LoRA for vLLM"}
    console().print(f"[bold]{safe(found.version)}[/] in {safe(found.folder)}: {words[found.form]}")
    rows = [(safe(name), size(count)) for name, count in found.files.items()]
    console().print(grid(rows + [("note", safe(note)) for note in found.notes]))
