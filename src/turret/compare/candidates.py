"""What is compared: `base,head,full,lora:r=4/8,r=16` as a list of methods with their settings. Loads no torch.

The grammar, in a line: methods with commas between them, a setting after a colon, further settings after commas, and
numbers to be tried one by one with slashes between them.

    base                         the base itself; a classifier's has a head that nobody trained
    head, full, lora, prefix     the recipe's own settings where it trains that method, else the defaults
    lora:r=4,lora_alpha=8        settings by the names that a recipe has, and lr
    lora:r=4/8/16                three rows
    lora:target_modules=query+value
    peft:IA3, peft:VERA,r=64     a method of PEFT by its name there, with PEFT's own settings

Refuses to know how anything is trained.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from turret.errors import RecipeError
from turret.methods import METHODS, method_named
from turret.recipe import Recipe
from turret.tasks import task_of

CLASSIFYING = "base,head,full,lora,prefix"
WRITING = "base,full,lora,prefix"


@dataclass(frozen=True)
class Candidate:
    """One method with its settings: a row of the comparison."""

    spec: str  # how it is said: "lora:r=4"
    kind: str  # base, head, full, lora, prefix, peft
    recipe: Recipe  # of its training, but for seed and data; the base trains nothing

    @property
    def label(self) -> str:
        """For reading: `lora r=4`."""
        named = method_named(self.kind).named_by is not None  # "peft:IA3" reads as IA3
        return (self.spec.removeprefix(f"{self.kind}:") if named else self.spec).replace(":", " ", 1).replace(",", " ")

    @property
    def slug(self) -> str:
        """For the name of a file."""
        return re.sub(r"[^a-z0-9]+", "-", self.spec.lower()).strip("-")[:60]


def is_floor(kind: str) -> bool:
    """Whether such a row only shows how little is enough, and does not contend."""
    return kind not in METHODS or METHODS[kind].head_alone


def candidates(
    text: str | None, recipe: Recipe, kind: str, lr: float | Literal["auto"] | None = None
) -> list[Candidate]:
    """The rows that `text` names, each with the learning rate that is its own. kind: of the task.

    A rate in the recipe belongs to the recipe's own method; lr: a rate for all, or "auto".
    """
    generates = task_of(kind).generates
    named = list(_split(text or (WRITING if generates else CLASSIFYING)))
    found: dict[str, Candidate] = {}
    for method, settings in named:
        if name := method_named(method).named_by:
            settings = _named(method, name, settings, recipe)
        if method_named(method).head_alone and generates:
            raise RecipeError(f"{method}: a base that is to {kind} has no head to train alone: leave {method} out")
        for chosen in _expanded(settings):
            made = _candidate(method, chosen, recipe, lr)
            found.setdefault(made.spec, made)
    if not found:
        raise RecipeError(f"no method to compare: give some, such as {CLASSIFYING}")
    return list(found.values())


def _split(text: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """("lora", [("r", "4"), ...]) for every method that is named."""
    methods: list[tuple[str, list[tuple[str, str]]]] = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        head, colon, rest = part.partition(":")
        if colon or "=" not in part:
            methods.append((_kind(head.strip()), []))
            part = rest.strip()
            if part and "=" not in part and (name := method_named(methods[-1][0]).named_by):
                part = f"{name}={part}"
            if not part:
                continue
        if not methods:
            raise RecipeError(f"{_short(part)}: a setting belongs after its method, such as lora:{_short(part)}")
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise RecipeError(f"{_short(part)}: expected SETTING=VALUE after {methods[-1][0]}:, such as lora:r=4")
        methods[-1][1].append((key.strip(), value.strip()))
    yield from methods


def _kind(word: str) -> str:
    kinds = dict.fromkeys((*CLASSIFYING.split(","), *METHODS))
    if word not in kinds:
        raise RecipeError(
            f"{_short(word)} is no method to compare: expected {', '.join(kinds)}, or peft:NAME for one of PEFT's"
        )
    return word


def _named(method: str, name: str, settings: list[tuple[str, str]], recipe: Recipe) -> list[tuple[str, str]]:
    """The settings with the one in front that names the method; the recipe's own where nothing names one."""
    said = [value for key, value in settings if key == name]
    if not said and method == recipe.method.kind:
        said = [getattr(recipe.method, name)]
    if len(said) != 1:
        raise RecipeError(f"{method}: expected one {method_named(method).named_as}")
    return [(name, said[0].upper().replace("-", "_")), *(pair for pair in settings if pair[0] != name)]


def _expanded(settings: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Every choice of the numbers that have slashes between them."""
    choices = []
    for key, value in settings:
        parts = value.split("/")
        many = len(parts) > 1 and all(re.fullmatch(r"[0-9.eE+-]+", part) for part in parts)
        choices.append([(key, part) for part in parts] if many else [(key, value)])
    yield from (list(each) for each in itertools.product(*choices))


def _candidate(
    method: str, settings: list[tuple[str, str]], recipe: Recipe, lr: float | Literal["auto"] | None
) -> Candidate:
    name = method_named(method).named_by
    said = [value if key == name else f"{key}={value}" for key, value in settings]
    spec = method + (":" + ",".join(said) if said else "")
    if method == "base":
        if settings:
            raise RecipeError(f"{_short(spec)}: the base is not trained and has no settings: say base")
        return Candidate("base", "base", _changed(recipe, {"method": "head", "train.lr": "none"}))
    own = method == recipe.method.kind and (name is None or dict(settings)[name] == getattr(recipe.method, name))
    if not own:  # from that method's defaults
        recipe = recipe.model_copy(update={"method": METHODS[method].model_construct()})
    rate = lr if lr is not None else recipe.train.lr if own else None
    if rate is None and recipe.train.lr == "auto":
        rate = "auto"
    changes: dict[str, Any] = {"method": method, "train.lr": "none" if rate is None else str(rate)}
    for key, value in settings:
        path = "train.lr" if key == "lr" else f"method.{key}"
        changes[path] = value.replace("+", ",") if key.endswith("_modules") else value
    try:
        return Candidate(spec, method, _changed(recipe, changes))
    except RecipeError as error:
        raise RecipeError(f"{_short(spec)}: {error}") from None


def _changed(recipe: Recipe, changes: dict[str, str]) -> Recipe:
    made = recipe.with_overrides(changes)
    start = made.train.model_copy(update={"init_from": None})  # every method begins at the base
    return made.model_copy(update={"train": start})


def _short(text: str) -> str:
    return ascii(text[:60])[1:-1]
