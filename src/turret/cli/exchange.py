"""`turret import` and `turret export`: store an adapter from elsewhere, and write a version for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from turret.cli import options
from turret.cli.output import console, grid, many, offer, report, safe, size, status
from turret.cli.train import Kind
from turret.errors import RecipeError

if TYPE_CHECKING:
    from turret.workspace import Exported, Imported, Pushed

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of [task], such as task.prefix_text=...; repeatable."),
]
OtherBase = Annotated[str | None, typer.Option("--base", help="Replaces the base that the adapter names.")]
Labels = Annotated[str | None, typer.Option("--labels", metavar="A,B,C", help="Labels of the head.")]


def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A PEFT folder, bundle, .zip, .tar.gz or Hub id.")],
    name: Annotated[str, typer.Option("--name", help="Name of the adapter in the store.")],
    base: OtherBase = None,
    task: Kind = None,
    labels: Labels = None,
    sets: Settings = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", min=1, max=1024, help="Rank of the LoRA into which LoHa, LoKr and similar are converted."
        ),
    ] = None,
    base_quantization: options.BaseQuantization = "none",
    device: options.Device = "auto",
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Check an adapter from elsewhere on its base, and store it.

    Reads safetensors only, never a pickle. A bundle that turret exported keeps its digest.
    """
    from turret.workspace import Workspace

    settings = task_settings(sets)
    with status() as say:
        found = Workspace(store).import_adapter(
            source,
            name,
            base=base,
            task=task,
            labels=label_names(labels),
            settings=settings,
            rank=rank,
            base_quantization=base_quantization,
            device=device,
            on_stage=say,
        )
    report(found, as_json, print_imported)
    if not as_json:
        offer([f'predict {found.version} "a text of your own"', f"evaluate {found.version} OTHER.csv"], store)


def export(
    reference: options.Ref,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter into the whole model.")] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="A LoRA that vLLM loads, or the reason why not.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="A LoRA for llama.cpp, or the reason why not.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also write into a folder that is not empty.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Write a stored version as a folder that PEFT loads, with a model card.

    `turret import` of the folder gives the same version again.
    """
    from turret.workspace import Workspace

    if merged + vllm + gguf > 1:
        raise RecipeError("--merged, --vllm and --gguf are different exports: give one of them")
    form: Literal["peft", "merged", "vllm", "gguf"] = (
        "merged" if merged else "vllm" if vllm else "gguf" if gguf else "peft"
    )
    with status() as say:
        found = Workspace(store).export(reference, folder, form=form, force=force, on_stage=say)
    report(found, as_json, _print_exported)


def label_names(labels: str | None) -> list[str] | None:
    """`"A, B"` -> `["A", "B"]`."""
    return [label.strip() for label in labels.split(",")] if labels else None


def task_settings(sets: list[str] | None) -> dict[str, str]:
    """The keys of [task] that `--set` gives. Raises RecipeError for any other key."""
    found = {}
    for key, value in options.overrides(sets).items():
        if not key.startswith("task."):
            raise RecipeError(f"--set {key}: expected a key of [task], such as task.prefix_text")
        found[key.removeprefix("task.")] = value
    return found


def print_imported(found: Imported) -> None:
    """Print what was stored, and what was checked."""
    console().print(f"[bold]{safe(found.version)}[/]  [dim]{safe(found.digest)}[/]")
    labels = ", ".join(found.task["labels"])
    rows = [
        ("base", f"{safe(found.base['id'])}  [dim]{safe(found.base['fingerprint'][:19])}[/]"),
        ("method", f"{safe(found.method)}, {many(found.parameters)} parameters in {found.tensors} tensors"),
        ("task", safe(f"{found.task['kind']}  {labels}")),
        ("checked", f"all tensors are used; outputs change by {found.effect:.2g} of the largest"),
        ("size", size(found.bundle_bytes)),
    ]
    console().print(grid(rows + [("note", safe(note)) for note in found.notes]))


def _print_exported(found: Exported) -> None:
    forms = {
        "peft": "a bundle that PEFT loads",
        "merged": "a whole model",
        "vllm": "a LoRA for vLLM",
        "gguf": "a LoRA for llama.cpp",
    }
    console().print(f"[bold]{safe(found.version)}[/] in {safe(found.folder)}: {forms[found.form]}")
    print_files(found)


def print_files(found: Exported | Pushed) -> None:
    """Print the files that were written with their sizes, then notes and warnings."""
    rows = [(safe(name), size(count)) for name, count in found.files.items()]
    rows += [("note", safe(note)) for note in found.notes]
    rows += [("[yellow]warn[/]", safe(each)) for each in found.warnings]
    console().print(grid(rows))
