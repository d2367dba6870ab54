"""Adapters from elsewhere and for other programs: `turret import`, `export`, `push`, `pull` and `merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from turret.amounts import many, size
from turret.cli import options
from turret.cli.output import console, grid, safe
from turret.cli.train import predict_command
from turret.errors import RecipeError
from turret.json_types import JsonObject

if TYPE_CHECKING:
    from turret.workspace import Exported, Imported, Merged, Pushed


# --- exchange ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What replaces or completes what an adapter says about itself, and how it is checked."""

    base: Annotated[str | None, Option(help="Replaces the base that the adapter names.")] = None
    task: options.Kind = None
    labels: Annotated[str | None, Option(metavar="A,B,C", help="Labels of the head.")] = None
    sets: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="A key of [task], such as task.prefix_text=...; repeatable."),
    ] = None
    rank: Annotated[
        int | None, Option(min=1, max=1024, help="Rank of the LoRA into which LoHa, LoKr and similar are converted.")
    ] = None
    base_quantization: options.BaseQuantization = "none"
    device: options.Device = "auto"

    def given(self) -> JsonObject:
        """The arguments of an import. Raises RecipeError for a key of `--set` that is not of [task]."""
        labels = [label.strip() for label in self.labels.split(",")] if self.labels else None
        settings = {}
        for key, value in options.overrides(self.sets).items():
            if not key.startswith("task."):
                raise RecipeError(f"--set {key}: expected a key of [task], such as task.prefix_text")
            settings[key.removeprefix("task.")] = value
        known: JsonObject = {"base": self.base, "task": self.task, "rank": self.rank, "device": self.device}
        return known | {"labels": labels, "settings": settings, "base_quantization": self.base_quantization}


def import_(
    *,
    source: Annotated[str, Argument(metavar="SOURCE", help="A PEFT folder, bundle, .zip, .tar.gz or Hub id.")],
    name: Annotated[str, Option(help="Name of the adapter in the store.")],
    description: Description,
    command: options.Command,
) -> None:
    """Check an adapter from elsewhere on its base, and store it.

    Reads safetensors only, never a pickle. A bundle that turret exported keeps its digest.
    """
    found = command.perform(print_imported, command.workspace.import_adapter, source, name, **description.given())
    _offer_use(command, found)


def export(
    *,
    reference: options.Ref,
    folder: Annotated[Path, Argument(metavar="FOLDER", help="A new or empty folder.")],
    merged: Annotated[bool, Option(help="Merge the adapter into the whole model.")] = False,
    vllm: Annotated[bool, Option(help="A LoRA that vLLM loads, or the reason why not.")] = False,
    gguf: Annotated[bool, Option(help="A LoRA for llama.cpp, or the reason why not.")] = False,
    force: Annotated[bool, Option(help="Also write into a folder that is not empty.")] = False,
    command: options.Command,
) -> None:
    """Write a stored version as a folder that PEFT loads, with a model card.

    `turret import` of the folder gives the same version again.
    """
    if merged + vllm + gguf > 1:
        raise RecipeError("--merged, --vllm and --gguf are different exports: give one of them")
    form: Literal["peft", "merged", "vllm", "gguf"] = (
        "merged" if merged else "vllm" if vllm else "gguf" if gguf else "peft"
    )
    command.perform(_print_exported, command.workspace.export, reference, folder, form=form, force=force)


def _offer_use(command: options.Command, found: Imported | Merged) -> None:
    """Offer to ask the version that was stored, and to measure it."""
    task = command.workspace.resolve(found.version).task
    command.offer(predict_command(found.version, task), f"evaluate {found.version} OTHER.csv")


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


HubId = Annotated[str, Argument(metavar="HUB_ID", help="A repository on the Hub: OWNER/NAME.")]


def push(
    *,
    reference: options.Ref,
    hub_id: HubId,
    public: Annotated[bool, Option(help="Make a new repository public. Default: private.")] = False,
    merged: Annotated[bool, Option(help="The whole model with the adapter in its weights.")] = False,
    gguf: Annotated[bool, Option(help="A LoRA for llama.cpp.")] = False,
    force: Annotated[bool, Option(help="Also replace and remove files that turret did not write.")] = False,
    command: options.Command,
) -> None:
    """Write a stored version into a repository of the Hub, with a model card and the tokenizer.

    Log in with `hf auth login` first, or set HF_TOKEN. A repository that is not there is created, private by default.
    """
    if merged and gguf:
        raise RecipeError("--merged and --gguf are two forms: give one of them")
    form: Literal["peft", "merged", "gguf"] = "merged" if merged else "gguf" if gguf else "peft"
    command.perform(_print_pushed, command.workspace.hub.push, reference, hub_id, form=form, public=public, force=force)


def pull(
    *,
    hub_id: HubId,
    name: Annotated[str | None, Option(help="Name in the store. Default: from the id.")] = None,
    revision: Annotated[str | None, Option(help="A branch, a tag or a commit.")] = None,
    description: Annotated[Description, options.Without(("rank",))],
    command: options.Command,
) -> None:
    """Fetch an adapter from the Hub, check it on its base as `turret import` does, and store it.

    If the Hub cannot be reached, the copy in its cache is taken, and a note says so.
    """
    verb, given = command.workspace.hub.pull, description.given()
    found = command.perform(print_imported, verb, hub_id, name, revision=revision, **given)
    _offer_use(command, found)


def _print_pushed(found: Pushed) -> None:
    kind = "private" if found.private else "public"
    what = f"a new {kind} repository" if found.created else f"a {kind} repository"
    same = "" if found.changed else ", which held the same files already"
    console().print(f"[bold]{safe(found.version)}[/] in {safe(found.url)}, {what}{same}")
    print_files(found)


# --- merge ------------------------------------------------------------------------------------------------------------


def merge(
    *,
    references: Annotated[list[str], Argument(metavar="REF...", help="Two versions or more, of one base.")],
    name: Annotated[str, Option(help="The name of the merged adapter.")],
    how: Annotated[str, Option(help="linear, svd, cat, ties, dare, dare-ties.")] = "ties",
    weights: Annotated[str | None, Option(metavar="A,B", help="A weight for each version; default: equal.")] = None,
    density: Annotated[float, Option(min=0.01, max=1.0, help="Share of values that ties and dare keep.")] = 0.5,
    command: options.Command,
) -> None:
    """Merge LoRA versions into a new version.

    The new version names all of them as its parents. Evaluate it before you promote it: gates apply to it too.
    """
    expected = "numbers with commas between them, such as 0.7,0.3"
    shares = None if weights is None else options.numbers("weights", weights, expected)
    found = command.perform(
        _print_merged, command.workspace.merge, references, name, how=how, weights=shares, density=density
    )
    _offer_use(command, found)


def _print_merged(found: Merged) -> None:
    console().print(f"[bold]{safe(found.version)}[/]  [dim]{safe(found.digest)}[/]")
    shares = zip(found.parents, found.weights, strict=True)
    rows = [
        (
            "merged",
            f"by {found.how}: " + ", ".join(f"{weight:g} of {safe(parent)}" for parent, weight in shares),
        ),
        ("checked", f"all tensors are used; outputs move by {found.effect:.2g} of the largest"),
        ("size", size(found.bundle_bytes)),
    ]
    console().print(grid(rows + [("note", safe(note)) for note in found.notes]))
