"""Apply `--set key=value`: read the text of a value as the type of its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from turret.errors import RecipeError
from turret.json_types import JsonObject, JsonValue
from turret.methods import METHODS, Method
from turret.methods.messages import KnownKeys, complaint, unknown_key
from turret.recipe import toml

T = TypeVar("T")


def override(
    settings: JsonObject, key: str, text: str, models: Mapping[str, type[BaseModel]], known: KnownKeys
) -> None:
    """Set one key of a recipe in place.

    Args:
        settings: the recipe as a dictionary.
        key: such as "train.lr".
        text: the value. `none` clears the setting; a list is TOML (`["q", "v"]`) or words with commas.
        models: the class of each table; "": the class of the recipe itself.

    Raises:
        RecipeError: the key is unknown, or the text does not fit its type.
    """
    table, _, leaf = key.partition(".")
    if not (table in models and leaf):
        table, leaf = "", key
    weight = leaf.removeprefix("class_weights.") if table == "task" else leaf
    if weight != leaf and weight:  # the name of a class may contain dots
        old = settings["task"]["class_weights"]
        number = _typed(key, text, TypeAdapter(float))
        settings["task"]["class_weights"] = {**(old if isinstance(old, dict) else {}), weight: number}
        return
    model = models[table]
    field = model.model_fields.get(leaf)
    if field is None and issubclass(model, Method) and model.open_settings:
        settings[table][leaf] = None if text.strip().lower() == "none" else _untyped(text)
        return
    if field is None or (not table and leaf in models):
        raise RecipeError(unknown_key(key, settings["method"]["kind"], known, METHODS))
    # Any: the type of the key is only known at run time
    annotated: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    value = _typed(key, text, TypeAdapter(annotated, config=ConfigDict(strict=True)))
    (settings[table] if table else settings)[leaf] = value


def _untyped(text: str) -> JsonValue:
    """A TOML value, else a list if the text has commas, else the text."""
    value = toml.value_or_text(text)
    return _comma_words(text) if value == text and "," in text else value


def _typed(key: str, text: str, type_: TypeAdapter[T]) -> T:
    """Read `text` as none, a TOML value, plain text or a list with commas: the first one that fits the type."""
    for read in (_none, toml.value, str, _comma_words):
        try:
            candidate = read(text)
            return type_.validate_python(tuple(candidate) if isinstance(candidate, list) else candidate)
        except (ValueError, RecursionError):  # ValidationError and TOMLDecodeError are ValueErrors
            continue
    try:
        type_.validate_python(toml.value_or_text(text))
    except ValidationError as error:
        raise RecipeError(f"{key}: {complaint(error.errors())}") from None
    raise AssertionError(key)


def _none(text: str) -> None:
    if text.strip().lower() != "none":
        raise ValueError(text)


def _comma_words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
