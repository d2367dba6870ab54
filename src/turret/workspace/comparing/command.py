"""The command line that makes a report again: every setting of the recipe and of the request that is not a default."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence

from turret.json_types import JsonValue
from turret.recipe import Data, Recipe


def command(verb: str, recipe: Recipe, options: Mapping[str, str | int | float | None]) -> str:
    """`turret compare DATA --base B --name N --set train.epochs=1 --seeds 5`.

    Args:
        options: name -> value; True is written as a flag, None and False are left out.
    """
    words = ["turret", verb, recipe.data.source, "--base", recipe.base, "--name", recipe.name]
    words += ["--seed", str(recipe.seed)]
    for key, value in _changes(recipe):
        words += ["--set", f"{key}={value}"]
    for name, option in options.items():
        if option is not None and option is not False:
            words += [f"--{name}"] if option is True else [f"--{name}", str(option)]
    return shlex.join(words)


def _changes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, value) of every setting that is not the default, as `--set` reads them."""
    defaults = Recipe(name=recipe.name, base=recipe.base, data=Data(source=recipe.data.source))
    if recipe.method.kind != defaults.method.kind:
        yield "method", recipe.method.kind
    for table in ("data", "task", "method", "train"):
        settings = getattr(recipe, table)
        default = type(settings).model_construct() if table == "method" else getattr(defaults, table)
        for key, value in settings.model_dump(mode="json").items():
            if key != "kind" and value != _as_json(getattr(default, key, None)):
                yield from _texts(f"{table}.{key}", value)
        if table == "task" and settings.kind is not None:
            yield "task.kind", settings.kind


def _as_json(value: JsonValue) -> JsonValue:
    return list(value) if isinstance(value, tuple) else value


def _texts(key: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, number in value.items():
            yield f"{key}.{name}", f"{number:g}"
    elif value is None:
        yield key, "none"
    elif isinstance(value, (bool, Sequence)) and not isinstance(value, str):
        yield key, json.dumps(value)
    else:
        yield key, str(value)
