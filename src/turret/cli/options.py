"""The options that several commands share, and the parser of `--set key=value`."""

from __future__ import annotations

from typing import Annotated

import typer

from turret.errors import RecipeError
from turret.location import Location

Store = Annotated[
    Location,
    typer.Option(
        "--store",
        envvar="TURRET_STORE",
        parser=Location.parse,
        metavar="STORE",
        help="Folder of the store, or postgresql://user@host/database?files=s3://bucket/prefix.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, and everything else on stderr.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, such as train.lr=1e-3; repeatable."),
]
Ref = Annotated[str, typer.Argument(metavar="REF", help="A version: name, name@3 or name@production.")]

STORE = Location.parse(".turret")


def overrides(pairs: list[str] | None) -> dict[str, str]:
    """`["train.lr=1e-3"]` -> `{"train.lr": "1e-3"}`."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {ascii(pair)[:60]}: expected KEY=VALUE, such as --set train.lr=1e-3")
        found[key.strip()] = value
    return found
