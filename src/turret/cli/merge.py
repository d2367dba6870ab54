"""`turret merge`: several versions of LoRA on one base into a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from turret.cli import options
from turret.cli.output import console, grid, offer, report, safe, size, status
from turret.errors import RecipeError

if TYPE_CHECKING:
    from turret.workspace import Merged


def merge(
    references: Annotated[list[str], typer.Argument(metavar="REF...", help="Two versions or more, of one base.")],
    name: Annotated[str, typer.Option("--name", help="The name of the merged adapter.")],
    how: Annotated[str, typer.Option("--how", help="linear, svd, cat, ties, dare, dare-ties.")] = "ties",
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="A,B", help="A weight for each version; default: equal.")
    ] = None,
    density: Annotated[
        float, typer.Option("--density", min=0.01, max=1.0, help="Share of values that ties and dare keep.")
    ] = 0.5,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Merge LoRA versions into a new version.

    The new version names all of them as its parents. Evaluate it before you promote it: gates apply to it too.
    """
    from turret.workspace import Workspace

    with status() as say:
        found = Workspace(store).merge(
            references, name, how=how, weights=_numbers(weights), density=density, on_stage=say
        )
    report(found, as_json, _print)
    if not as_json:
        offer([f'predict {found.version} "a text of your own"', f"evaluate {found.version} OTHER.csv"], store)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights {text}: expected numbers with commas between them, such as 0.7,0.3") from None


def _print(found: Merged) -> None:
    console().print(f"[bold]{safe(found.version)}[/]  [dim]{safe(found.digest)}[/]")
    shares = zip(found.parents, found.weights, strict=True)
    rows = [
        ("merged", f"by {found.how}: " + ", ".join(f"{weight:g} of {safe(parent)}" for parent, weight in shares)),
        ("checked", f"all tensors are used; outputs move by {found.effect:.2g} of the largest"),
        ("size", size(found.bundle_bytes)),
    ]
    console().print(grid(rows + [("note", safe(note)) for note in found.notes]))
