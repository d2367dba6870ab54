"""The options that several commands share, and the parser of `--set key=value`."""

from __future__ import annotations

from typing import Annotated, Literal

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
On = Annotated[
    str | None,
    typer.Option("--on", metavar="WHERE", help="workers (turret worker) or ray://HOST:PORT; default: train here."),
]
Text = Annotated[str | None, typer.Option("--text", metavar="COLUMN", help="Column of the texts to classify.")]
TextPair = Annotated[
    str | None, typer.Option("--text-pair", metavar="COLUMN", help="Column of a second text, read with the first.")
]
Label = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="COLUMN", help="Column of their classes or numbers; repeatable for classes."),
]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="COLUMN", help="Column of the texts to answer.")]
Completion = Annotated[str | None, typer.Option("--completion", metavar="COLUMN", help="Column of the answers.")]
Messages = Annotated[str | None, typer.Option("--messages", metavar="COLUMN", help="Column of conversations.")]
BaseQuantization = Annotated[
    Literal["none", "nf4"],
    typer.Option("--base-quantization", help="nf4 keeps the base's linear layers in 4 bits (turret[quantized])."),
]
Ref = Annotated[str, typer.Argument(metavar="REF", help="A version: name, name@3 or name@production.")]

Device = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="auto (a GPU if the base fits), cpu, cuda, cuda:1 or mps."),
]
TrainDevice = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="auto (a GPU if the plan fits), cpu, cuda, cuda:1 or mps."),
]

STORE = Location.parse(".turret")


def columns(
    text: str | None = None,
    text_pair: str | None = None,
    label: list[str] | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    messages: str | None = None,
) -> dict[str, str | list[str]]:
    """Role -> column for each option that is given: keys of a recipe's `[data]`. Several labels are a list."""
    given: dict[str, str | list[str] | None] = {"text": text, "text_pair": text_pair}
    given["label"] = label[0] if label and len(label) == 1 else label
    given |= {"prompt": prompt, "completion": completion, "messages": messages}
    return {role: column for role, column in given.items() if column}


def overrides(pairs: list[str] | None) -> dict[str, str]:
    """`["train.lr=1e-3"]` -> `{"train.lr": "1e-3"}`."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {ascii(pair)[:60]}: expected KEY=VALUE, such as --set train.lr=1e-3")
        found[key.strip()] = value
    return found
