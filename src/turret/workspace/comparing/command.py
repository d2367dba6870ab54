"""The command line that makes a report again: from the recipe and what was asked, complete and without defaults."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from turret.recipe import Data, Recipe


def command(verb: str, recipe: Recipe, options: Mapping[str, object]) -> str:
    """`turret compare DATA --base B --name N --set train.epochs=1 --seeds 5`. options: None and False are left out."""
    words = ["turret", verb, recipe.data.source, "--base", recipe.base, "--name", recipe.name]
    words += ["--seed", str(recipe.seed)]
    for key, value in _changes(recipe):
        words += ["--set", f"{key}={value}"]
    for name, given in options.items():
        if given is not None and given is not False:
            words += [f"--{name}"] if given is True else [f"--{name}", str(given)]
    return shlex.join(words)


def _changes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, value) of every setting that is not the default, so that `--set` gives the recipe again."""
    plain = Recipe(name=recipe.name, base=recipe.base, data=Data(source=recipe.data.source))
    if recipe.method.kind != plain.method.kind:
        yield "method", recipe.method.kind
    for section in ("data", "task", "method", "train"):
        mine = getattr(recipe, section)
        plainly = type(mine).model_construct() if section == "method" else getattr(plain, section)
        for key, value in mine.model_dump(mode="json").items():
            if key != "kind" and value != _plain(getattr(plainly, key, None)):
                yield from _said(f"{section}.{key}", value)
        if section == "task" and mine.kind is not None:
            yield "task.kind", mine.kind


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _said(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield f"{key}.{name}", f"{each:g}"
    elif value is None:
        yield key, "none"
    elif isinstance(value, (bool, Sequence)) and not isinstance(value, str):
        yield key, json.dumps(value)
    else:
        yield key, str(value)
