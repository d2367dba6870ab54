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


# --- hub --------------------------------------------------------------------------------------------------------------
# `turret push` and `turret pull`: versions to and from the Hub.


HubId = Annotated[str, typer.Argument(metavar="HUB_ID", help="A repository on the Hub: OWNER/NAME.")]


def push(
    reference: options.Ref,
    hub_id: HubId,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model with the adapter in its weights.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="A LoRA for llama.cpp.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also replace files that turret did not write.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Write a stored version into a repository of the Hub, with a model card and the tokenizer.

    Log in with `hf auth login` first, or set HF_TOKEN. A repository that is not there is created, private by default.
    """
    from turret.workspace import Workspace

    if merged and gguf:
        raise RecipeError("--merged and --gguf are two forms: give one of them")
    form: Literal["peft", "merged", "gguf"] = "merged" if merged else "gguf" if gguf else "peft"
    with status() as say:
        found = Workspace(store).hub.push(reference, hub_id, form=form, public=public, force=force, on_stage=say)
    report(found, as_json, _print_pushed)


def pull(
    hub_id: HubId,
    name: Annotated[str | None, typer.Option("--name", help="Name in the store. Default: from the id.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, a tag or a commit.")] = None,
    base: OtherBase = None,
    task: Kind = None,
    labels: Labels = None,
    sets: Settings = None,
    base_quantization: options.BaseQuantization = "none",
    device: options.Device = "auto",
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Fetch an adapter from the Hub, check it on its base as `turret import` does, and store it.

    If the Hub cannot be reached, the copy in its cache is taken, and a note says so.
    """
    from turret.workspace import Workspace

    with status() as say:
        found = Workspace(store).hub.pull(
            hub_id,
            name,
            revision=revision,
            base=base,
            task=task,
            labels=label_names(labels),
            settings=task_settings(sets),
            base_quantization=base_quantization,
            device=device,
            on_stage=say,
        )
    report(found, as_json, print_imported)
    if not as_json:
        offer([f'predict {found.version} "a text of your own"', f"evaluate {found.version} OTHER.csv"], store)


def _print_pushed(found: Pushed) -> None:
    kind = "private" if found.private else "public"
    what = f"a new {kind} repository" if found.created else f"a {kind} repository"
    same = "" if found.changed else ", which held the same files already"
    console().print(f"[bold]{safe(found.version)}[/] in {safe(found.url)}, {what}{same}")
    print_files(found)
