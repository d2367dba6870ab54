"""`turret push` and `turret pull`: versions to and from the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from turret.cli import options
from turret.cli.exchange import (
    Labels,
    OtherBase,
    Settings,
    label_names,
    print_files,
    print_imported,
    task_settings,
)
from turret.cli.output import console, offer, report, safe, status
from turret.cli.train import Kind
from turret.errors import RecipeError

if TYPE_CHECKING:
    from turret.workspace import Pushed

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
