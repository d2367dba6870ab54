"""What pydantic complains of, in the words of our errors and on one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turret.errors import one_line, shown

KIND_NAMES = {"string": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
KIND_NAMES |= {"int_from_float": "a whole number", **dict.fromkeys(("model_attributes", "model", "dict"), "a table")}


def as_many_as_fit(sentences: Sequence[str], most: int = 230) -> str:
    """The first mistakes, and how many more there are: with the recipe's name before it, one line."""
    said = one_line(sentences[0], most)
    for place, sentence in enumerate(sentences[1:], 1):
        if len(said) + len(sentence) > most:
            return f"{said}; and {len(sentences) - place} more"
        said = f"{said}; {sentence}"
    return said


def complaint(items: Sequence[Any]) -> str:
    """What is wrong with one key. items: pydantic's errors of it, one for each type that it may have."""
    texts: list[str] = []
    for item in items:
        text = str(item["msg"]).removeprefix("Value error, ")
        kind = str(item["type"]).removesuffix("_type").removesuffix("_parsing")
        text = f"expected {KIND_NAMES[kind]}" if kind in KIND_NAMES else text[:1].lower() + text[1:]
        text = text.replace("input should be", "expected")
        texts.append(text if not texts else text.removeprefix("expected "))
    text = " or ".join(dict.fromkeys(texts))
    return text if "given" in text or "bad adapter name" in text else f"{text}, given {shown(items[0].get('input'))}"
