"""Reads `base,linear,full,lora:r=4/8,r=16` as a list of methods with their settings: the rows of a comparison.

Methods are separated by commas. A colon comes before the first setting and commas before further ones. Slashes separate
numbers that are tried one by one.

    base                         the bare base; an encoder that classifies has an untrained head
    linear, lead, nearest        baselines that train nothing, for some tasks
    full, lora, prefix, head     the recipe's settings if it trains that method, else the defaults
    lora:r=4,lora_alpha=8        settings by their names in a recipe, and lr and epochs
    lora:r=4/8/16                three rows
    lora:target_modules=query+value
    peft:IA3, peft:VERA,r=64     a method of PEFT by its name there, with PEFT's settings
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from turret.errors import RecipeError
from turret.methods import METHODS, method_named
from turret.recipe import Recipe
from turret.tasks import task_of

TRAINED = ("full", "lora", "prefix")  # compared by default
UNTRAINED = {  # kind -> what answers
    "base": "the bare base",
    "linear": "a logistic regression on the frozen base's features",
    "lead": "the first sentence of the text",
    "nearest": "the answer of the nearest training text",
}
OF_TRAIN = ("lr", "epochs")  # settings of a method that belong to the recipe's [train]


@dataclass(frozen=True)
class Candidate:
    """One method with its settings: a row of the comparison."""

    spec: str  # as the command has it: "lora:r=4"
    kind: str  # full, lora, prefix, head, peft, or a key of UNTRAINED
    recipe: Recipe  # of its training, without seed and data; of UNTRAINED, it says how the base is loaded

    @property
    def label(self) -> str:
        """The name in a report: `lora r=4`."""
        named = method_named(self.kind).named_by is not None  # "peft:IA3" reads as IA3
        return (self.spec.removeprefix(f"{self.kind}:") if named else self.spec).replace(":", " ", 1).replace(",", " ")

    @property
    def slug(self) -> str:
        """The name in a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.spec.lower()).strip("-")[:60]

    @property
    def trains(self) -> bool:
        """Whether a training makes it. The other rows have no version."""
        return self.kind not in UNTRAINED

    def at(self, epochs: int) -> Candidate:
        """The same method trained for so many epochs."""
        spec = f"{self.spec}{',' if ':' in self.spec else ':'}epochs={epochs}"
        train = self.recipe.train.model_copy(update={"epochs": epochs})
        return Candidate(spec, self.kind, self.recipe.model_copy(update={"train": train}))


def is_floor(kind: str) -> bool:
    """Whether a row shows the least that a method must beat: the bare base, or the head alone."""
    return kind == "base" or method_named(kind).head_alone


def candidates(
    text: str | None, recipe: Recipe, kind: str, lr: float | Literal["auto"] | None = None
) -> list[Candidate]:
    """The rows that `text` names. Raises RecipeError.

    Args:
        text: the methods; None: those that are usual for the task.
        recipe: its settings and learning rate hold for its own method; other methods use their defaults.
        kind: of the task.
        lr: a learning rate for all methods, or "auto".
    """
    generates, baselines = task_of(kind).generates, task_of(kind).baselines
    named = list(_split(text or _usual(recipe, baselines)))
    rows: dict[str, Candidate] = {}
    for method, settings in named:
        if name := method_named(method).named_by:
            settings = _named(method, name, settings, recipe)
        if method in UNTRAINED and method not in ("base", *baselines):
            raise RecipeError(f"{method}: task {kind} has no such baseline: expected {', '.join(('base', *baselines))}")
        if method_named(method).head_alone and generates:
            raise RecipeError(f"{method}: the base of task {kind} has no head to train alone: leave {method} out")
        for chosen in _expanded(settings):
            row = _candidate(method, chosen, recipe, lr)
            rows.setdefault(row.spec, row)
    if not rows:
        raise RecipeError(f"no method to compare: give some, such as {_usual(recipe, baselines)}")
    return list(rows.values())


def with_equal_epochs(rows: Sequence[Candidate], against: str, epochs: Callable[[Candidate], int]) -> list[Candidate]:
    """The rows, and the baseline trained for as many epochs as each other method, where they differ.

    Args:
        against: spec or kind of the baseline.
        epochs: of a training.
    """
    judged = next((row for row in rows if row.spec == against), None)
    judged = judged or next((row for row in rows if row.kind == against), None)
    if judged is None or not judged.trains:
        return list(rows)
    wanted = sorted({epochs(row) for row in rows if row.trains and not method_named(row.kind).head_alone})
    more = [judged.at(each) for each in wanted if each != epochs(judged)]
    known = {row.spec for row in rows}
    return [*rows, *(row for row in more if row.spec not in known)]


def _usual(recipe: Recipe, baselines: Sequence[str]) -> str:
    """The rows that are usual for the task, of methods that train on the recipe's base."""
    quantized = recipe.base_quantization is not None
    trained = (each for each in TRAINED if not (quantized and METHODS[each].not_quantized))
    return ",".join(("base", *baselines, *trained))


def _split(text: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """("lora", [("r", "4"), ...]) for each method."""
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
    kinds = dict.fromkeys((*UNTRAINED, *TRAINED, *METHODS))
    if word not in kinds:
        raise RecipeError(
            f"{_short(word)} is not a method to compare: expected {', '.join(kinds)}, or peft:NAME for one of PEFT's"
        )
    return word


def _named(method: str, name: str, settings: list[tuple[str, str]], recipe: Recipe) -> list[tuple[str, str]]:
    """The settings with the method's name first: the given one, else the recipe's."""
    names = [value for key, value in settings if key == name]
    if not names and method == recipe.method.kind:
        names = [getattr(recipe.method, name)]
    if len(names) != 1:
        raise RecipeError(f"{method}: expected one {method_named(method).named_as}")
    return [(name, names[0].upper().replace("-", "_")), *(pair for pair in settings if pair[0] != name)]


def _expanded(settings: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """The settings once for each combination of numbers that slashes separate."""
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
    parts = [value if key == name else f"{key}={value}" for key, value in settings]
    spec = method + (":" + ",".join(parts) if parts else "")
    if method in UNTRAINED:
        if settings:
            raise RecipeError(f"{_short(spec)}: {method} is not trained and has no settings: give {method} alone")
        return Candidate(method, method, _changed(recipe, {"method": "head", "train.lr": "none"}))
    own = method == recipe.method.kind and (name is None or dict(settings)[name] == getattr(recipe.method, name))
    if not own:  # start from the method's defaults
        recipe = recipe.model_copy(update={"method": METHODS[method].model_construct()})
    rate = lr if lr is not None else recipe.train.lr if own else None
    if rate is None and recipe.train.lr == "auto":
        rate = "auto"
    changes = {"method": method, "train.lr": "none" if rate is None else str(rate)}
    for key, value in settings:
        path = f"train.{key}" if key in OF_TRAIN else f"method.{key}"
        changes[path] = value.replace("+", ",") if key.endswith("_modules") else value
    try:
        return Candidate(spec, method, _changed(recipe, changes))
    except RecipeError as error:
        raise RecipeError(f"{_short(spec)}: {error}") from None


def _changed(recipe: Recipe, changes: dict[str, str]) -> Recipe:
    changed = recipe.with_overrides(changes)
    train = changed.train.model_copy(update={"init_from": None})  # every method starts from the base
    return changed.model_copy(update={"train": train})


def _short(text: str) -> str:
    return ascii(text[:60])[1:-1]
