"""Pydantic's validation errors of recipes and methods as sentences of one-line errors, with the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from turret.errors import shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

KnownKeys = Callable[[str], Iterable[str]]  # kind of method -> every key of a recipe with that method, "train.lr"
Methods = Mapping[str, type[BaseModel]]  # the class of each kind of method

_OTHER_NAMES = {  # other tools' names for our keys
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rank": "r",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "gradient_clip",
    "early_stopping_patience": "early_stopping",
    "patience": "early_stopping",
    "precision": "dtype",
    "max_length": "max_tokens",
    "max_source_length": "max_tokens",
    "max_target_length": "max_target_tokens",
    "prefix": "prefix_text",
    "source_prefix": "prefix_text",
    "model": "base",
    "dataset": "data",
}
_TYPE_NAMES = {"string": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
_TYPE_NAMES |= {"int_from_float": "a whole number", **dict.fromkeys(("model_attributes", "model", "dict"), "a table")}


def sentences(model: type[BaseModel], error: ValidationError, known: KnownKeys, methods: Methods) -> Iterator[str]:
    """One sentence per wrong key.

    A key whose type is a union has an error per member. Only the errors with the deepest location are shown: their
    member of the union came closest to the value.
    """
    groups: dict[str, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        path = ".".join(filter(None, [getattr(model, "section", ""), *map(str, item["loc"][:1])]))
        groups.setdefault(path, []).append(item)
    if "data" in groups:
        groups.pop("name", None)  # it is made from the data
    for path, items in groups.items():
        depth = max(len(item["loc"]) for item in items)
        items = [item for item in items if len(item["loc"]) == depth]
        kind = items[0]["type"]
        if kind == "extra_forbidden":
            own = next((kind for kind, each in methods.items() if each is model), "lora")
            yield unknown_key(path, own, known, methods)
        elif kind == "missing":
            yield f"{path} is missing: {_missing_remedy(path)}"
        elif kind == "sentences":  # raised by the validator of `method`
            yield from items[0]["ctx"]["sentences"]
        else:
            yield f"{path}: {complaint(items)}"


def complaint(errors: Sequence[ErrorDetails]) -> str:
    """What is wrong with one key: "expected a whole number, given 'x'".

    Args:
        errors: pydantic's errors for that key, one per member of its union.
    """
    texts: list[str] = []
    for error in errors:
        text = error["msg"].removeprefix("Value error, ")
        kind = error["type"].removesuffix("_type").removesuffix("_parsing")
        text = f"expected {_TYPE_NAMES[kind]}" if kind in _TYPE_NAMES else text[:1].lower() + text[1:]
        text = text.replace("input should be", "expected")
        texts.append(text if not texts else text.removeprefix("expected "))
    text = " or ".join(dict.fromkeys(texts))
    return text if "given" in text or "bad adapter name" in text else f"{text}, given {shown(errors[0].get('input'))}"


def unknown_key(key: str, method: str, known: KnownKeys, methods: Methods) -> str:
    """The sentence for an unknown key, with the key that was probably meant.

    Args:
        method: the kind of the recipe's method.
    """
    every, (section, _, leaf) = list(known(method)), key.rpartition(".")
    siblings = [k for k in every if k.rpartition(".")[0] == section]
    owners = [kind for kind, model in methods.items() if section == "method" and leaf in model.model_fields]
    own_name = _OTHER_NAMES.get(leaf, leaf)
    meant = [k for k in siblings or every if k.rpartition(".")[2] == own_name]
    meant += [k for k in every if k.rpartition(".")[2] == own_name]  # `lr` alone means `train.lr`
    leaves = {k.rpartition(".")[2]: k for k in siblings or every}
    others = {other: leaves[own] for other, own in _OTHER_NAMES.items() if own in leaves}
    meant += [(leaves | others)[near] for near in difflib.get_close_matches(leaf, [*leaves, *others], n=1)]
    meant += difflib.get_close_matches(key, every, n=1)
    if owners:
        remedy = f'it belongs to method.kind = "{owners[0]}", this method is "{method}"'
    elif meant:
        remedy = f"did you mean {meant[0]!r}?"
    else:
        in_table = bool(siblings and section)
        names = leaves if in_table else dict.fromkeys(k.partition(".")[0] for k in every)
        remedy = f"known {f'in [{section}] ' if in_table else ''}are {', '.join(names)}"
    return f"unknown key {shown(key)}: {remedy}"


def _missing_remedy(key: str) -> str:
    return {
        "data": "add a [data] table with a source",
        "data.source": "say where the examples are: a file, a folder, a Hub id or a pypi: package",
    }.get(key, "add it")
